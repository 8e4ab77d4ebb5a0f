"""Families of diffusion transformers, a folder each: shape, network, weights in diffusers, encoders."""
