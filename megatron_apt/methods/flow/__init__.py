"""Stage 0: flow matching."""
