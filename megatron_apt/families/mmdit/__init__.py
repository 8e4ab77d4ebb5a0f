"""MMDiT: separate weights for text and visual tokens in every layer, and joint attention."""
