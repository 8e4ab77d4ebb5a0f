"""The families of diffusers' transformers that there are."""

from megatron_apt.convert.family import Family
from megatron_apt.convert.flux import FLUX
from megatron_apt.convert.hunyuan import HUNYUAN
from megatron_apt.convert.sd3 import SD3
from megatron_apt.convert.source import ConvertError
from megatron_apt.convert.wan import WAN
from megatron_apt.encoders.weight_files import printable
from megatron_apt.models.config import ModelConfig

FAMILIES: dict[str, Family] = {family.architecture: family for family in (WAN, SD3, FLUX, HUNYUAN)}


def family_of(config: dict, where: str) -> Family:
    """The family of a config.json.

    Raises:
        ConvertError: an architecture that is not known.
    """
    found = config.get("_class_name")
    if found == "WanModel":
        raise ConvertError(
            f"{where}: _class_name='WanModel' is the layout of Wan's authors; use the repository with "
            "-Diffusers in its name"
        )
    if not isinstance(found, str) or found not in FAMILIES:
        raise ConvertError(
            f"{where}: _class_name={printable(repr(found))} is not known; there are {', '.join(FAMILIES)}"
        )
    return FAMILIES[found]


def family_of_model(model: ModelConfig, where: str) -> Family:
    """The family of one of our checkpoints.

    Raises:
        ConvertError: its model has no counterpart in diffusers.
    """
    found = [family for family in FAMILIES.values() if family.name == model.family]
    if not found:
        raise ConvertError(
            f"{where}: model.family={model.family!r} has no counterpart in diffusers; "
            f"{', '.join(f.name for f in FAMILIES.values())} have"
        )
    return found[0]
