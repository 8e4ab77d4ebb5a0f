"""Saving, committing and loading training state through Megatron-Core's dist_checkpointing."""
