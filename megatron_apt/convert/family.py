"""What a Hugging Face family is to the rest of the package: its configuration and its weights, both ways."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from megatron_apt.convert.weights import Mapped, Rule, mapped
from megatron_apt.models.config import ModelConfig
from megatron_apt.models.families import build_backbone
from megatron_apt.models.parameters import full_shape
from megatron_apt.parallel.mesh import Mesh


@dataclass(frozen=True)
class Family:
    """One family of diffusers' transformers.

    Attributes:
        name: as in ModelConfig.family.
        architecture: its class in diffusers, `_class_name` of config.json.
        read_config: our shape from config.json; raises ValueError naming a field whose value we do not have.
        write_config: config.json from our shape; read_config undoes it.
        rules: the map of weights for one shape.
    """

    name: str
    architecture: str
    read_config: Callable[[dict], ModelConfig]
    write_config: Callable[[ModelConfig], dict]
    rules: Callable[[ModelConfig], list[Rule]]

    def tensors(self, model: ModelConfig, mesh: Mesh) -> list[Mapped]:
        """Every tensor of a model of this shape, with what it is made of."""
        return mapped(self.rules(model), whole_shapes(model, mesh))


def whole_shapes(model: ModelConfig, mesh: Mesh) -> dict[str, torch.Size]:
    """Names and whole shapes of our parameters, without memory for them."""
    mesh = replace(mesh, device=torch.device("meta"))
    with torch.device("meta"):
        return {name: torch.Size(full_shape(p, mesh)) for name, p in build_backbone(model, mesh).named_parameters()}


def only(config: dict, architecture: str, **values) -> None:
    """Stops at a field of config.json whose value we do not have; a missing field has its first value.

    Raises:
        ValueError: naming field and value.
    """
    for field, accepted in values.items():
        accepted = accepted if isinstance(accepted, tuple) else (accepted,)
        if (found := config.get(field, accepted[0])) not in accepted:
            raise ValueError(f"config.json: {field}={found!r} of a {architecture} is not supported; it can be {' or '.join(map(repr, accepted))}")
