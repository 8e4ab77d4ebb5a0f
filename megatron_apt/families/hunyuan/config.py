"""Shape of a HunyuanVideo."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_apt.families.single_stream.config import SingleStreamConfig
from megatron_apt.models.checks import DEEPEST, check_whole


@dataclass(frozen=True, kw_only=True)
class HunyuanConfig(SingleStreamConfig):
    """Double and single blocks, before which a small transformer refines the text."""

    family: ClassVar[str] = "hunyuan"
    text_padding: ClassVar[int | None] = 0
    codec: ClassVar[str] = "hunyuan"

    double_blocks: int = 20
    guidance: float = 6.0
    refiner_blocks: int = 2
    """Of the small transformer that reads the text first."""

    def _check_fields(self) -> None:
        super()._check_fields()
        check_whole(self, "model.", 0, DEEPEST, "refiner_blocks")

    @property
    def blocks(self) -> int:
        return self.depth + self.refiner_blocks


def hunyuan_video() -> HunyuanConfig:
    """HunyuanVideo (13B): 20 double and 40 single blocks."""
    return HunyuanConfig(
        depth=60,
        width=3072,
        heads=24,
        mlp_width=12288,
        latent_channels=16,
        text_width=4096,
        rope_theta=256.0,
        dtype="bfloat16",
        recompute="full",
    )
