"""Maps between a family's tensors and ours: which tensors of theirs make one of ours,
rearranged how. Every change is exact in both directions.

Patterns hold `{i}` for the number of a block. Which dimension of our tensor tensor
parallelism splits is a fact of our parameter (models/parameters.py); changes therefore
act on whole tensors, and the checkpoint they end in loads on any mesh.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Change(Protocol):
    """One rearrangement of numbers. `ours` undoes `theirs`, bit for bit; both work on the meta device."""

    def ours(self, parts: Sequence[Tensor]) -> Tensor: ...

    def theirs(self, tensor: Tensor) -> list[Tensor]: ...


@dataclass(frozen=True)
class Same:
    """One tensor, as it is."""

    def ours(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]

    def theirs(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]


@dataclass(frozen=True)
class View:
    """The same numbers in the same order under another shape; -1 as in `reshape`."""

    our_shape: tuple[int, ...]
    their_shape: tuple[int, ...]

    def ours(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].reshape(self.our_shape)

    def theirs(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.reshape(self.their_shape)]


@dataclass(frozen=True)
class ByHead:
    """Several projections to heads, (H K, ...) each with a K of its own, in one whose
    rows are ordered (head, projection, K).
    """

    heads: int
    widths: tuple[int, ...]  # K of each

    def ours(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(0, (self.heads, -1)) for part in parts], dim=1).flatten(0, 1)

    def theirs(self, tensor: Tensor) -> list[Tensor]:
        return [
            part.flatten(0, 1).contiguous()
            for part in tensor.unflatten(0, (self.heads, -1)).split(self.widths, dim=1)
        ]


@dataclass(frozen=True)
class ColumnsByHead:
    """A projection from several inputs, (D, H K) of each side by side, whose columns
    become ordered (head, input, K).
    """

    heads: int
    widths: tuple[int, ...]  # K of each

    def ours(self, parts: Sequence[Tensor]) -> Tensor:
        inputs = parts[0].split([self.heads * width for width in self.widths], dim=1)
        return torch.cat([part.unflatten(1, (self.heads, -1)) for part in inputs], dim=2).flatten(1, 2)

    def theirs(self, tensor: Tensor) -> list[Tensor]:
        return [
            torch.cat(
                [
                    part.flatten(1, 2)
                    for part in tensor.unflatten(1, (self.heads, -1)).split(self.widths, dim=2)
                ],
                dim=1,
            )
        ]


@dataclass(frozen=True)
class Stacked:
    """Several tensors of one shape as rows of one."""

    parts: int

    def ours(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(parts))

    def theirs(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.unbind(0))


@dataclass(frozen=True)
class Reordered:
    """Equal pieces of the first dimension in another order: piece i of ours is piece `order[i]` of theirs."""

    order: tuple[int, ...]

    def ours(self, parts: Sequence[Tensor]) -> Tensor:
        pieces = parts[0].chunk(len(self.order))
        return torch.cat([pieces[i] for i in self.order])

    def theirs(self, tensor: Tensor) -> list[Tensor]:
        pieces = tensor.chunk(len(self.order))
        return [torch.cat([pieces[self.order.index(i)] for i in range(len(self.order))])]


@dataclass(frozen=True)
class ChannelsFirst:
    """Rows of a projection to patches: theirs ordered (patch, channel), ours (channel, patch)."""

    patch: tuple[int, ...]

    def ours(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].unflatten(0, (math.prod(self.patch), -1)).transpose(0, 1).flatten(0, 1)

    def theirs(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.unflatten(0, (-1, math.prod(self.patch))).transpose(0, 1).flatten(0, 1)]


@dataclass(frozen=True)
class Rule:
    """Which of their tensors make one of ours."""

    ours: str
    theirs: tuple[str, ...]
    change: Change = Same()
    ahead: int = 0  # by how much the number of our block exceeds theirs


@dataclass(frozen=True)
class Mapped:
    """One tensor of ours with the tensors of theirs it is made of."""

    name: str
    shape: torch.Size
    theirs: dict[str, torch.Size]
    change: Change
    fixed: bool = False  # never trained, so that there is no average of it


def layer(ours: str, theirs: str, weight: Change = Same(), bias: Change | None = None) -> list[Rule]:
    """The rules of a linear layer or norm: weight and bias."""
    return [
        Rule(f"{ours}.weight", (f"{theirs}.weight",), weight),
        Rule(f"{ours}.bias", (f"{theirs}.bias",), weight if bias is None else bias),
    ]


def joined(ours: str, theirs: Sequence[str], change: Change) -> list[Rule]:
    """Several linear layers in one of ours."""
    return [
        Rule(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), change)
        for kind in ("weight", "bias")
    ]


def mapped(rules: Iterable[Rule], shapes: dict[str, torch.Size], fixed: Iterable[str] = ()) -> list[Mapped]:
    """The rules applied to every tensor of a model of ours, given by name and whole
    shape; `fixed` names those that are never trained.

    Raises:
        ValueError: a tensor for which there is no rule, or more than one: the family's
            map and our model have come apart.
    """
    compiled = [(re.compile(re.escape(rule.ours).replace(r"\{i\}", r"(\d+)")), rule) for rule in rules]
    found = []
    for name, shape in shapes.items():
        hits = [(match, rule) for pattern, rule in compiled if (match := pattern.fullmatch(name))]
        if len(hits) != 1:
            raise ValueError(f"{len(hits)} rules for our tensor {name!r}; exactly one is needed")
        match, rule = hits[0]
        number = str(int(match.groups()[0]) - rule.ahead) if match.groups() else ""
        names = [pattern.replace("{i}", number) for pattern in rule.theirs]
        parts = rule.change.theirs(torch.empty(shape, device="meta"))
        found.append(
            Mapped(
                name,
                shape,
                {key: part.shape for key, part in zip(names, parts, strict=True)},
                rule.change,
                name in fixed,
            )
        )
    return found
