"""From video files and captions to latent shards, and from shards to microbatches."""
