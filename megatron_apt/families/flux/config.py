"""Shape of a FLUX.1."""

from dataclasses import dataclass, replace
from typing import ClassVar

from megatron_apt.families.single_stream.config import SingleStreamConfig


@dataclass(frozen=True, kw_only=True)
class FluxConfig(SingleStreamConfig):
    """Double and single blocks, for pictures."""

    family: ClassVar[str] = "flux"
    text_padding: ClassVar[int | None] = 512
    codec: ClassVar[str] = "kl"
    pictures: ClassVar[bool] = True

    double_blocks: int = 19
    guidance: float = 3.5


def flux_dev() -> FluxConfig:
    """FLUX.1 dev (12B): 19 double and 38 single blocks, told a scale of guidance."""
    return FluxConfig(
        depth=57,
        width=3072,
        heads=24,
        latent_channels=16,
        text_width=4096,
        dtype="bfloat16",
        recompute="full",
    )


def flux_schnell() -> FluxConfig:
    """FLUX.1 schnell (12B), which is not told of guidance."""
    return replace(flux_dev(), guidance=0.0)
