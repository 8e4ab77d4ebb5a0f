"""Diffusion transformers, their discriminator, codecs and text encoders."""
