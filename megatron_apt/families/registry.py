"""The families there are: a line for each.

A family's shape is imported here, which takes no torch. Its other modules are imported when they are
asked for; a family without one of them (an MMDiT has no pipeline) lacks what that is for.

    families/NAME/config.py    its shape, a ModelConfig, with checks and presets
    families/NAME/model.py     MODEL, its network
    families/NAME/weights.py   WEIGHTS, its weights and configuration in diffusers
    families/NAME/text.py      TEXT, the text encoder of its pipelines
    families/NAME/codec.py     CODEC, the codec of its pipelines, if it is its own
"""

import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from megatron_apt.families.flux.config import FluxConfig
from megatron_apt.families.hunyuan.config import HunyuanConfig
from megatron_apt.families.mmdit.config import MMDiTConfig
from megatron_apt.families.sd3.config import Sd3Config
from megatron_apt.families.wan.config import WanConfig
from megatron_apt.models.config import ModelConfig

if TYPE_CHECKING:  # torch is not needed for a shape
    from megatron_apt.models.backbone import Backbone
    from megatron_apt.models.stages import Cut
    from megatron_apt.parallel.mesh import Mesh

FAMILIES: dict[str, type[ModelConfig]] = {
    kind.family: kind for kind in (MMDiTConfig, WanConfig, Sd3Config, HunyuanConfig, FluxConfig)
}
DEFAULT: type[ModelConfig] = MMDiTConfig
TAG = "family"  # of a stored shape


def part(family: str, module: str, name: str) -> Any:
    """What a family's module holds under a name; None where the family has no such module."""
    path = f"{__package__}.{family}.{module}"
    return getattr(importlib.import_module(path), name) if importlib.util.find_spec(path) else None


def parts(module: str, name: str) -> list[Any]:
    """The same of every family that has such a module."""
    return [found for family in FAMILIES if (found := part(family, module, name)) is not None]


def build_backbone(
    model: ModelConfig,
    mesh: "Mesh",
    depth: int | None = None,
    output: bool = True,
    cut: "Cut | None" = None,
) -> "Backbone":
    """The diffusion transformer of this shape. Arguments as of Backbone.

    Raises:
        ValueError: a shape with something left open.
    """
    for name in ("family", "latent_channels", "text_width"):
        if not getattr(model, name):
            raise ValueError(f"model.{name} is left open; give it, or fit the run to its dataset")
    options = {} if cut is None else {"cut": cut}
    return part(model.family, "model", "MODEL")(model, mesh, depth, output, **options)


def to_stored(model: ModelConfig) -> dict[str, Any]:
    """A shape as it is stored: its fields behind the name of its family."""
    return {TAG: model.family} | asdict(model)


def kind_of(stored: object, where: str) -> tuple[type[ModelConfig], Any]:
    """The class of a stored shape, and its fields as that class has them.

    Shapes were once stored with the fields of all families, each family's own in a section of its
    name; and with what its family never varies.

    Raises:
        ValueError: the family is not known.
    """
    if not isinstance(stored, dict):
        return DEFAULT, stored  # which the conversion tells of
    found = stored.get(TAG, DEFAULT.family)
    if not isinstance(found, str) or found not in FAMILIES:
        shown = repr(found)[:200]
        raise ValueError(f"{where}: {TAG}={shown}: use {', '.join(map(repr, FAMILIES))}")
    kind = FAMILIES[found]
    own, known = stored.get(found), {field.name for field in fields(kind)}
    kept = {name: value for name, value in stored.items() if name != TAG and name not in FAMILIES}
    kept |= own if isinstance(own, dict) else {}
    fixed = [name for name in kept if name not in known and _is_fixed(kind, name, kept[name])]
    return kind, {name: value for name, value in kept.items() if name not in fixed}


def _is_fixed(kind: type[ModelConfig], name: str, value: object) -> bool:
    """Whether all shapes of a family have this value, so that it need not be stored."""
    return name in ModelConfig.__annotations__ and getattr(kind, name, None) == value


def codecs_of(kinds: Iterable[type[ModelConfig]]) -> list[str]:
    """Names of their pipelines' codecs, each once."""
    return list(dict.fromkeys(kind.codec for kind in kinds))
