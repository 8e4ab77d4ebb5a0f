"""Whether a run may continue from a checkpoint: what it computes must be the same, where
and how it runs may change.
"""

import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_apt.checkpoint.state import configuration_of
from megatron_apt.checkpoint.store import CheckpointError, latest
from megatron_apt.config import RunConfig, to_dict
from megatron_apt.data.identity import Identity

# Fields, or fields of fields, that may change between an interrupted run and its continuation.
_FREE = frozenset(
    {
        *("output", "iterations", "parallel", "pipeline", "micro_batch", "init", "guards", "fresh"),
        *("log_every", "save_every", "save_async", "retention", "kernels", "tensorboard", "wandb"),
        *("optimizer.overlap", "optimizer.bucket_size"),
    }
)
_SHARDS = "data.shards"
_MISSING = object()
_LONGEST = 200  # characters shown of a value
_UNCOMMITTED = ".uncommitted"  # in an output folder whose run has begun and has no checkpoint yet


def begin(config: RunConfig) -> None:
    """Makes sure that a run may begin or go on in its output folder: one that has lost
    its checkpoints does not begin at 0 unasked.

    Raises:
        CheckpointError: the folder holds what a run left, but no checkpoint, or
            checkpoints that are damaged.
    """
    output = Path(config.output)
    if _goes_on(config):
        committed(output)
        return
    checkpoints = output / "checkpoints"
    if os.path.lexists(checkpoints) and not checkpoints.is_dir():
        raise CheckpointError(
            f"{checkpoints}: is no folder, so that nothing can be saved there; remove it, or give another "
            "--output"
        )
    found = [name for name in ("log.jsonl", "summary.json") if os.path.lexists(output / name)]
    found += [
        f"checkpoints/{file.name}"
        for file in (sorted(checkpoints.iterdir()) if checkpoints.is_dir() else ())
        if file.name[0] != "."
    ]
    if found and not config.fresh and not (output / _UNCOMMITTED).exists():
        raise CheckpointError(
            f"{output}: a run was here ({', '.join(found[:5])}), but none of its checkpoints is whole. Copy "
            "its checkpoints back to go on from them, give another --output, or --fresh to begin at "
            "iteration 0 here (the log is kept as log.discarded.jsonl)"
        )
    if config.fresh and any(name.startswith("checkpoints/") for name in found):
        checkpoints.rename(_unused(output / "checkpoints-before"))
    (output / _UNCOMMITTED).touch()


def _goes_on(config: RunConfig) -> bool:
    try:
        return latest(config.output) is not None
    except CheckpointError:
        if not config.fresh:
            raise
        return False


def committed(output: str | os.PathLike) -> None:
    """Notes that the run has a checkpoint."""
    (Path(output) / _UNCOMMITTED).unlink(missing_ok=True)


def _unused(path: Path) -> Path:
    return next(
        place for i in itertools.count() if not (place := path.with_name(f"{path.name}-{i}")).exists()
    )


def check_same_run(
    stored: dict,
    wanted: dict,
    folder: os.PathLike,
    trained_on: Sequence[Identity] = (),
    data: Sequence[Identity] = (),
) -> None:
    """Compares the configuration in a checkpoint with the one asked for.

    Args:
        trained_on, data: what the checkpoint says of its datasets, and the datasets of
            this run. A checkpoint that says nothing (of an older version) is compared by
            the folders' paths.

    Raises:
        CheckpointError: naming every field that may not change and has.
    """
    # A field that is missing is younger than the checkpoint
    stored = _plain(to_dict(configuration_of(stored, os.fspath(folder))))
    changed = [(name, was, now) for name, was, now in _differences(stored, _plain(wanted)) if name != _SHARDS]
    found = [
        f"{_short(name)}: {_shown(was)} in the checkpoint, {_shown(now)} asked for"
        for name, was, now in changed
    ]
    found += _other_data(trained_on, data) if trained_on else _other_paths(stored, wanted)
    if found:
        more = f"; and {len(found) - 12} more" if len(found) > 12 else ""
        raise CheckpointError(
            f"{folder}: cannot continue what was trained otherwise: {'; '.join(found[:12])}{more}. Give the "
            "checkpoint's configuration and data to continue, or another --output to train anew"
        )
    if stored["iterations"] != wanted["iterations"] and wanted["optimizer"]["decay"] == "cosine":
        warnings.warn(
            f"{folder}: {wanted['iterations']} iterations instead of {stored['iterations']} change the "
            "cosine decay",
            stacklevel=2,
        )


def _differences(stored: object, wanted: object, name: str = "") -> Iterator[tuple[str, object, object]]:
    """(dotted name, stored, wanted) of each field that differs."""
    if name in _FREE:
        return
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in {**stored, **wanted}:
            yield from _differences(
                stored.get(key, _MISSING), wanted.get(key, _MISSING), f"{name}.{key}" if name else key
            )
    elif stored != wanted:
        yield name, stored, wanted


def _shown(value: object) -> str:
    return "not there" if value is _MISSING else _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def _other_data(trained_on: Sequence[Identity], data: Sequence[Identity]) -> list[str]:
    """Differences between datasets, wherever they lie."""
    if len(trained_on) != len(data):
        return [f"{_SHARDS}: {len(trained_on)} datasets in the checkpoint, {len(data)} asked for"]
    return [
        f"{_SHARDS}[{i}]: {now.path} holds other data ({now.samples} samples, digest {now.digest[:12]}) than "
        f"the dataset the checkpoint was trained on ({was.path}: {was.samples} samples, digest "
        f"{was.digest[:12]})"
        for i, (was, now) in enumerate(zip(trained_on, data, strict=True))
        if (was.samples, was.digest) != (now.samples, now.digest)
    ]


def _other_paths(stored: dict, wanted: dict) -> list[str]:
    was, now = (
        [str(Path(path).resolve()) for path in config["data"]["shards"]] for config in (stored, wanted)
    )
    return [f"{_SHARDS}: {_shown(was)} in the checkpoint, {_shown(now)} asked for"] if was != now else []


def _plain(value):
    """Configuration as JSON has it: tuples are lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def warn_of_random_weights(config: RunConfig) -> None:
    """Methods that begin from checkpoints run without, for tests and benchmarks; nobody else means to."""
    empty = [f"init.{name}" for name in config.of_method.needs if not getattr(config.init, name)]
    if empty:
        warnings.warn(
            f"{' and '.join(empty)} empty: those weights are random; give checkpoints unless this is a test",
            stacklevel=3,
        )
