"""FLUX.1: double and single blocks, and nothing else."""

from megatron_apt.families.single_stream.model import SingleStream

MODEL = SingleStream
