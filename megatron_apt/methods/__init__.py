"""Training methods, each a list of phases: which networks see which data. They know no loop, no rank and no schedule."""
