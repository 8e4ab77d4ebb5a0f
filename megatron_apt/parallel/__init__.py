"""Start-up, the mesh, collectives with exact adjoints, context-parallel attention and keyed randomness."""
