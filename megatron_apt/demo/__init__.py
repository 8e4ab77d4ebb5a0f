"""The main job on real data, on a CPU: its recipes, what it measures, and the report a person reads."""
