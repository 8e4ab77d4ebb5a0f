"""Samples of a trained generator, as pictures and clips."""
