"""Training methods, a folder each: its settings and what others need to know of it
(config.py), and its phases, which say which networks see which data (method.py). They
know no loop, no rank and no schedule.
"""
