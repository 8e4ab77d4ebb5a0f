"""The main job on real data, on a CPU: its recipes, what it measures, and the report a person reads."""

from megatron_apt.moved import names_of

__getattr__ = names_of(__name__)
