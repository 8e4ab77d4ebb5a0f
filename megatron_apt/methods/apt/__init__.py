"""Stage 2: adversarial post-training."""
