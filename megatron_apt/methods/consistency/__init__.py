"""Stage 1: consistency distillation."""
