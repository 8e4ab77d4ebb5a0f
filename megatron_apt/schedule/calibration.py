"""What a block costs on a chip, as `tools/benchmarks/gpu.sh` measured it."""

import os
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from megatron_apt.models.config import ModelConfig
from megatron_apt.schedule.graph import Cost
from megatron_apt.schema import convert, read_json

Time = Annotated[float, Meta(gt=0, le=1e6)]
REMEDY = "give a calibration that `bash tools/benchmarks/gpu.sh` has written on a GPU"
MOST_RATIO = 1e6  # of one measured time to another


@dataclass(frozen=True)
class Calibration:
    """Seconds of one block for one sample.

    Attributes:
        seconds: of its forward pass, input gradients and weight gradients.
        flops: of its forward pass.
        what: device and number format.
    """

    seconds: Cost
    flops: float
    visual_tokens: int
    text_tokens: int
    what: str

    @property
    def relative(self) -> Cost:
        """The same with the forward pass as the unit."""
        return Cost(1.0, self.seconds.I / self.seconds.F, self.seconds.W / self.seconds.F)

    def block(self, model: ModelConfig) -> Cost:
        """Seconds of a block of another model on samples of the same length, by its arithmetic."""
        cost = self.seconds * (model.block_flops(self.visual_tokens, self.text_tokens) / self.flops)
        # The backward pass begins with another forward pass
        again = cost.F if model.recompute == "full" else 0.0
        return Cost(cost.F, cost.I + again, cost.W)


class _Times(TypedDict):
    F: Time
    I: Time  # noqa: E741
    W: Time


class _Stored(TypedDict):
    """What tools/benchmarks/gpu.sh writes, as far as it is read."""

    device: str
    width: Annotated[int, Meta(ge=1, le=10**6)]
    mlp_ratio: Annotated[int, Meta(ge=1, le=1000)]
    visual_tokens: Annotated[int, Meta(ge=1, le=2**40)]
    text_tokens: Annotated[int, Meta(ge=0, le=2**40)]
    blocks: dict[str, Any]  # those that are asked for: _Times


def read(source: str) -> Calibration:
    """From `FILE` or `FILE:FORMAT`, for example `FILE:fp8 current`; bf16 if left out.

    Raises:
        ValueError: naming the file, the field and what is wrong with it.
    """
    path, colon, name = (source, "", "") if os.path.exists(source) else source.rpartition(":")
    path, name = (path, name) if colon else (source, "bf16")
    stored = read_json(path, _Stored, remedy=REMEDY)
    if name not in stored["blocks"]:
        known = ", ".join(map(repr, list(stored["blocks"])[:20])) or "nothing: every measurement failed"
        raise ValueError(f"calibration={_short(source)}: has no {_short(name)!r}; it has {known}")
    times = convert(stored["blocks"][name], _Times, f"{path}: blocks, {name}", remedy=REMEDY)
    tokens = stored["visual_tokens"], stored["text_tokens"]
    if max(times.values()) > MOST_RATIO * min(times.values()):
        raise ValueError(
            f"calibration={_short(source)}: {name!r} holds times {times}, which no block takes; measure it "
            "again"
        )
    # Of the block that is measured all tokens attend to all
    measured = ModelConfig(width=stored["width"], heads=1, mlp_ratio=stored["mlp_ratio"])
    flops = measured.block_flops(*tokens)
    return Calibration(Cost(**times), flops, *tokens, f"{_short(stored['device'])}, {name}")


def _short(text: str) -> str:
    return text if len(text) <= 300 else text[:300] + "..."
