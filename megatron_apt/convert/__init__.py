"""Hugging Face checkpoints in and out: declarative maps of weights; nothing is read through pickle."""
