"""The networks and phases of a run, from the module of its method."""

from importlib import import_module

from megatron_apt.config import RunConfig
from megatron_apt.methods.base import Method
from megatron_apt.parallel.mesh import Mesh


def build_method(config: RunConfig, mesh: Mesh | None) -> Method:
    """What a run trains. No other method is imported.

    Args:
        mesh: None where only the phases are asked for, and no network is built.
    """
    module = import_module(f"{__package__}.{config.method}.method")
    return module.method(config, mesh)
