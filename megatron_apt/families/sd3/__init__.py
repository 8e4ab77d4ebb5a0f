"""Stable Diffusion 3 and 3.5: an MMDiT of pictures, with a table of positions."""
