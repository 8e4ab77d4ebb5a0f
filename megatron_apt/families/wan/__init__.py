"""Wan 2.1 and 2.2 (dense): self-attention, then cross-attention to the text."""
