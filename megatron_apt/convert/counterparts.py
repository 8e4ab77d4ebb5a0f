"""The families that diffusers has, found by what a checkpoint says of itself."""

import functools

from megatron_apt.convert.counterpart import Counterpart
from megatron_apt.convert.errors import ConvertError
from megatron_apt.encoders.weight_files import printable
from megatron_apt.families import registry
from megatron_apt.models.config import ModelConfig


@functools.cache
def counterparts() -> dict[str, Counterpart]:
    """By the class in diffusers, in the order of the registry."""
    return {found.architecture: found for found in registry.parts("weights", "WEIGHTS")}


def counterpart_of(config: dict, where: str) -> Counterpart:
    """The family of a config.json.

    Raises:
        ConvertError: an architecture that is not known.
    """
    found, known = config.get("_class_name"), counterparts()
    for family in known.values():
        if found and found == family.authors.architecture:
            raise ConvertError(f"{where}: _class_name={found!r} is {family.authors.remedy}")
    if not isinstance(found, str) or found not in known:
        raise ConvertError(
            f"{where}: _class_name={printable(repr(found))} is not known; there are {', '.join(known)}"
        )
    return known[found]


def counterpart_of_model(model: ModelConfig, where: str) -> Counterpart:
    """The family of one of our checkpoints.

    Raises:
        ConvertError: its model has no counterpart in diffusers.
    """
    found = registry.part(model.family, "weights", "WEIGHTS")
    if found is None:
        have = ", ".join(family.config.family for family in counterparts().values())
        raise ConvertError(
            f"{where}: model.family={model.family!r} has no counterpart in diffusers; {have} have"
        )
    return found
