"""From videos, pictures and captions to latent shards."""
