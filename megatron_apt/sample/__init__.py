"""Samples of a trained generator, as pictures and clips."""

from megatron_apt.moved import names_of

__getattr__ = names_of(__name__)
