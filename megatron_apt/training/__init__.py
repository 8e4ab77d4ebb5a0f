"""The training loop and what surrounds it: networks with their optimisers, logs,
progress, and what ends a run early.
"""
