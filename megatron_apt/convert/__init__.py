"""Hugging Face checkpoints in and out: one module per family, each a declarative map of weights; nothing is read through pickle."""
