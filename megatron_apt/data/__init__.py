"""From latent shards to microbatches."""
