"""What turns pixels and captions into numbers before a diffusion transformer sees them:
codecs, text and image encoders.
"""
