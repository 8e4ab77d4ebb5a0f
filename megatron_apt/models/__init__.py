"""Diffusion transformers and their discriminator."""
