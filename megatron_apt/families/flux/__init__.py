"""FLUX.1: an MMDiT of pictures whose later layers share weights between text and visual tokens."""
