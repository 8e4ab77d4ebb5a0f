"""HunyuanVideo: an MMDiT with single-stream later layers, before which the text is refined."""
