"""state.json of a commit: what it must hold, and the configuration in it."""

import json
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast, get_type_hints

from megatron_apt import schema
from megatron_apt.checkpoint.files import CheckpointError
from megatron_apt.config import RunConfig, to_dict
from megatron_apt.families import registry
from megatron_apt.models.config import ModelConfig

FORMAT = 2
STATE = "state.json"
MOST_STATE = 8 << 20  # bytes: ours have some thousand, and a name for each folder of data
DAMAGED = "the checkpoint is damaged, use an older one"
_COMMIT = re.compile(r"iteration-(\d{8,15})")


class State(TypedDict):
    """What a commit knows beside its tensors. Those who write one may add fields of their own."""

    format: int
    iteration: schema.Count
    config: dict[str, Any]
    updates: dict[str, schema.Count]
    """Optimiser steps of each network."""
    sources: dict[str, str]
    """Where each network's weights came from."""
    ema: bool
    """Whether there is an average of the generator."""
    samples_seen: schema.Count
    values: NotRequired[dict[str, float]]
    """Means of what was logged since the commit before."""
    imported: NotRequired[dict[str, Any]]
    """config.json of the checkpoint that was imported."""
    part: NotRequired[str]
    """Of a pipeline, that it was imported as."""


class _Format(TypedDict):
    format: Any


class _Values(TypedDict):
    values: dict[str, float]


def name(iteration: int) -> str:
    """Of the commit's folder."""
    return f"iteration-{iteration:08d}"


def iteration_of(folder: str) -> int | None:
    """The iteration of a commit from its folder's name; None for any other folder."""
    found = _COMMIT.fullmatch(folder)
    return int(found[1]) if found and name(int(found[1])) == folder else None


def read_state(folder: Path) -> State:
    """state.json of a checkpoint, with the configuration of this version's fields: those
    that are younger than it have their defaults.

    Raises:
        CheckpointError: missing, or something in it is not what it must be; names the
            field.
    """
    file = folder / STATE
    found = schema.read_json(file, dict[str, Any], remedy=DAMAGED, error=CheckpointError, most=MOST_STATE)
    if schema.convert(found, _Format, str(file), remedy=DAMAGED, error=CheckpointError)["format"] != FORMAT:
        raise CheckpointError(f"{file}: is not of format {FORMAT}, which this version reads")
    # Where 3.0 has become 3
    found |= schema.convert(found, State, str(file), remedy=DAMAGED, error=CheckpointError)
    if iteration_of(folder.name) not in (None, found["iteration"]):
        raise CheckpointError(
            f"{file}: iteration: is {found['iteration']} in a folder {folder.name}; {DAMAGED}"
        )
    config = configuration_of(found["config"], str(file), "config")
    found["config"] = json.loads(json.dumps(to_dict(config)))
    return cast(State, found)


def read_values(folder: Path) -> dict[str, float]:
    """The means in a state.json, whatever else is in it.

    Raises:
        CheckpointError: there are none that can be read.
    """
    found = schema.read_json(folder / STATE, _Values, remedy=DAMAGED, error=CheckpointError, most=MOST_STATE)
    return found["values"]


def configuration_of(stored: dict[str, Any], where: str = "configuration", at: str = "") -> RunConfig:
    """A run's configuration from its JSON form; fields that are not there have their defaults.

    Args:
        where, at: the file it stands in, and the field of it.

    Raises:
        CheckpointError: a field that this version does not know, or a value that it
            cannot have.
    """
    rest = {name: value for name, value in stored.items() if name != "model"}
    config = from_dict(RunConfig, rest, where, at)
    if "model" not in stored:
        return config
    return replace(config, model=model_of(stored["model"], where, f"{at}.model" if at else "model"))


def model_of(stored: object, where: str = "configuration", at: str = "model") -> ModelConfig:
    """A model's shape from its JSON form, of whatever version. Arguments and errors as of
    configuration_of.
    """
    try:
        kind, own = registry.kind_of(stored, f"{where}: {at}")
    except ValueError as error:
        raise CheckpointError(f"{error}; {DAMAGED}") from None
    return from_dict(kind, own, where, at)


def from_dict(kind: type, stored: object, where: str = "configuration", at: str = "") -> Any:
    """Settings of a kind from their JSON form. Arguments and errors as of configuration_of."""
    _check_known(kind, stored, f"{where}: {at}" if at else where)
    return schema.convert(stored, kind, where, at=at, remedy=DAMAGED, error=CheckpointError)


def _check_known(kind: Any, stored: object, where: str) -> None:
    if not isinstance(stored, dict):
        return  # which the conversion tells of
    hints = get_type_hints(kind)
    unknown = set(stored) - {field.name for field in fields(kind)}
    if unknown:
        names = sorted(str(name)[:100] for name in unknown)[:20]
        raise CheckpointError(
            f"{where} of {kind.__name__} has unknown fields {names}; it was written by another version, or "
            "is damaged"
        )
    for field, value in stored.items():
        if is_dataclass(hints[field]):
            _check_known(hints[field], value, f"{where}.{field}")
