"""Whether a run may continue from a checkpoint: what it computes must be the same, where and how it runs may change."""

import itertools
import os
import warnings

from megatron_apt.checkpoint.store import CheckpointError
from megatron_apt.config import RunConfig, to_dict

# Fields, or fields of fields, that may change between an interrupted run and its continuation.
_FREE = {
    *("output", "iterations", "parallel", "pipeline", "micro_batch", "init", "guards"),
    *("log_every", "save_every", "save_async", "retention", "kernels", "tensorboard", "wandb"),
}
_FREE_INSIDE = {"optimizer": ("overlap", "bucket_size")}


def check_same_run(stored: dict, wanted: dict, folder: os.PathLike) -> None:
    """Compares the configuration in a checkpoint with the one asked for.

    Raises:
        CheckpointError: naming the first field that may not change and has.
    """
    stored = _filled(stored, _plain(to_dict(RunConfig())))  # a field that is missing is younger than the checkpoint
    for name in itertools.chain(stored, wanted):
        if name not in _FREE and _comparable(name, stored.get(name)) != _comparable(name, wanted.get(name)):
            raise CheckpointError(
                f"{folder}: was trained with {name}={stored.get(name)}, this run asks for {wanted.get(name)}; "
                "use another output folder, or the same configuration to continue"
            )
    if stored["iterations"] != wanted["iterations"] and wanted["optimizer"]["decay"] == "cosine":
        warnings.warn(f"{folder}: {wanted['iterations']} iterations instead of {stored['iterations']} change the cosine decay", stacklevel=2)


def _filled(stored: dict, defaults: dict) -> dict:
    filled = {}
    for name, default in defaults.items():
        value = stored.get(name, default)
        filled[name] = _filled(value, default) if isinstance(default, dict) else value
    return stored | filled


def _comparable(name: str, value):
    plain = _plain(value)
    return {key: item for key, item in plain.items() if key not in _FREE_INSIDE[name]} if name in _FREE_INSIDE and plain else plain


def _plain(value):
    """Configuration as JSON has it: tuples are lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def warn_of_random_weights(config: RunConfig) -> None:
    """APT and distillation of random weights run, which tests and benchmarks use; nobody else means to."""
    needed = {"consistency": ("diffusion",), "apt": ("generator", "diffusion")}.get(config.method, ())
    empty = [f"init.{name}" for name in needed if not getattr(config.init, name)]
    if empty:
        warnings.warn(f"{' and '.join(empty)} empty: those weights are random; give checkpoints unless this is a test", stacklevel=3)
