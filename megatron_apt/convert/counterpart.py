"""What a Hugging Face family is to the rest of the package: its configuration and its weights, both ways."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_apt.convert.errors import ConvertError
from megatron_apt.convert.weights import Mapped, Rule, mapped
from megatron_apt.encoders.weight_files import printable
from megatron_apt.families.registry import build_backbone
from megatron_apt.models.condition import Condition
from megatron_apt.models.config import ModelConfig
from megatron_apt.models.embeddings import patchify
from megatron_apt.models.parameters import declared, full_shape
from megatron_apt.parallel.mesh import Mesh

SECOND = "transformer_2"  # of a pipeline of two networks
# Fields of config.json whose null means something: as many as in_channels, or none.
_NULLABLE = ("out_channels", "image_dim", "dual_attention_layers")
# Of any number in a config.json: above what models have, and small enough for their
# products
_LARGEST = 10**7


@dataclass(frozen=True)
class Inputs:
    """What a model of either library is given: latents (n, C, F, H, W), times (n,) in [0,
    1], conditions, and channels beside the latents.
    """

    latents: Tensor
    t: Tensor
    text: Tensor  # (n, L, E)
    pooled: Tensor | None = None  # (n, E')
    given: Tensor | None = None  # (n, C', F, H, W)
    image: Tensor | None = None  # (n, L', E'')
    first: Tensor | None = None  # (n, C, 1, H, W) given first frames, in the place of the latents' own
    guidance: Tensor | None = None  # (n,) scale of guidance that models with such an input are told

    def condition(self, patch: tuple[int, int, int]) -> Condition:
        n, length = self.text.shape[:2]
        pooled = self.text.mean(1) if self.pooled is None else self.pooled
        visual = None if self.given is None else patchify(self.given, patch)
        first = None if self.first is None else patchify(self.first, patch)
        return Condition(self.text.flatten(0, 1), (length,) * n, pooled, visual, self.image, first)


@dataclass(frozen=True)
class Authors:
    """Files of a family's authors, whose names are not diffusers'.

    Attributes:
        title: what they call the family.
        names: expression of names that only such files have.
        own_names: of names that are diffusers' in another family, and so tell such a file only
            beside a config.json of this family.
        architecture: `_class_name` in their config.json; "": it has none.
        remedy: what to do with a folder of that kind.
    """

    title: str
    names: str
    own_names: str = ""
    architecture: str = ""
    remedy: str = ""


def _as_it_is(index: dict, model: ModelConfig, file: Path, one_step: bool) -> dict:
    return index


@dataclass(frozen=True)
class Counterpart:
    """A family's counterpart in diffusers.

    Attributes:
        config: the shape of its models.
        architecture: its class in diffusers, `_class_name` of config.json.
        read_config: our shape from config.json; raises ValueError naming a field whose
            value we do not have.
        write_config: config.json from our shape; read_config undoes it.
        rules: the map of weights for one shape.
        example: random inputs of n samples for a model of this shape.
        forward: the velocity (n, C, F, H, W) that diffusers' model gives for such inputs.
        roots: the words that begin the names of its tensors in diffusers.
        authors: by what files of its authors are known.
        unread: expression of the names of tensors that published checkpoints hold and diffusers'
            class leaves unread (its _keys_to_ignore_on_load_unexpected).
        interface: fields of its shape, beside those of every family, in which a model meets the
            other parts of a pipeline.
        adapted: makes the model_index.json of a pipeline fit a model, from (index, model, its
            file, whether the model is for one step); raises ConvertError where it cannot.
    """

    config: type[ModelConfig]
    architecture: str
    read_config: Callable[[dict], ModelConfig]
    write_config: Callable[[Any], dict]
    rules: Callable[[Any], list[Rule]]
    example: Callable[[Any, int, torch.Generator], Inputs]
    forward: Callable[[Any, Inputs], Tensor]
    roots: frozenset[str]
    authors: Authors
    unread: str = ""
    interface: tuple[str, ...] = ()
    adapted: Callable[[dict, Any, Path, bool], dict] = _as_it_is

    def model(self, config: dict, where: Path) -> ModelConfig:
        """Our shape from the config.json of `where`.

        Raises:
            ConvertError: a field that is missing, or has a value that we do not have.
        """
        try:
            return self.read_config(config)
        except KeyError as error:
            raise ConvertError(
                f"{where}: config.json lacks {error.args[0]}, which a {self.architecture} has; download it "
                "again"
            ) from None
        except (TypeError, ValueError, OverflowError) as error:
            raise ConvertError(f"{where}: no {self.architecture} that can be converted: {error}") from None

    def tensors(self, model: ModelConfig, mesh: Mesh) -> list[Mapped]:
        """Every tensor of a model of this shape, with what it is made of."""
        mesh = replace(mesh, device=torch.device("meta"))
        with torch.device("meta"):  # shapes without memory
            parameters = dict(build_backbone(model, mesh).named_parameters())
        shapes = {name: torch.Size(full_shape(p, mesh)) for name, p in parameters.items()}
        return mapped(
            self.rules(model), shapes, {name for name, p in parameters.items() if declared(p).fixed}
        )


def only(config: dict, architecture: str, **values) -> None:
    """Stops at a field of config.json whose value we do not have; a missing field has its
    first value.

    Raises:
        ValueError: naming field and value.
    """
    for field, accepted in values.items():
        accepted = accepted if isinstance(accepted, tuple) else (accepted,)
        found = config.get(field, accepted[0])
        if not any(type(found) is type(value) and found == value for value in accepted):
            wanted = " or ".join(map(repr, accepted))
            raise ValueError(
                f"config.json: {field}={_shown(found)} of a {architecture} is not supported; it can be "
                f"{wanted}"
            )


def whole(config: dict, architecture: str, **lengths: int) -> None:
    """Stops at a field of config.json that is not one whole number (length 1), or a list
    of that many (0: of any length). Missing ones pass, as do those that are null where
    that means something.

    Raises:
        ValueError: naming field and value.
    """
    for field, length in lengths.items():
        if field not in config or (config[field] is None and field in _NULLABLE):
            continue
        value, wanted = (
            config[field],
            "a whole number" if length == 1 else f"{length or 'a list of'} whole numbers",
        )
        parts = [value] if length == 1 else value
        if (
            not isinstance(parts, list | tuple)
            or (length and len(parts) != length)
            or any(type(part) is not int for part in parts)
        ):
            raise ValueError(f"config.json: {field}={_shown(value)} of a {architecture} must be {wanted}")
        if any(not 0 <= part <= _LARGEST for part in parts):
            raise ValueError(
                f"config.json: {field}={_shown(value)} of a {architecture} must be from 0 to {_LARGEST}"
            )


def positive(config: dict, architecture: str, *fields: str) -> None:
    """Stops at a field of config.json that is no number above 0, or one that no model
    has. Missing ones pass.

    Raises:
        ValueError: naming field and value.
    """
    for field in fields:
        value = config.get(field, 1)
        if type(value) not in (int, float) or not 0 < value <= _LARGEST:
            raise ValueError(
                f"config.json: {field}={_shown(value)} of a {architecture} must be a positive number up to "
                f"{_LARGEST}"
            )


def flags(config: dict, architecture: str, *fields: str) -> None:
    """Stops at a field of config.json that is neither true nor false. Missing ones pass.

    Raises:
        ValueError: naming field and value.
    """
    for field in fields:
        if type(value := config.get(field, True)) is not bool:
            raise ValueError(
                f"config.json: {field}={_shown(value)} of a {architecture} must be true or false"
            )


def _shown(value: object) -> str:
    return printable(repr(value))
