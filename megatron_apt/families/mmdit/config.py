"""Shape of an MMDiT."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_apt.models.checks import check_choices
from megatron_apt.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig(ModelConfig):
    """Separate text and visual weights in every layer, joint attention, rotary positions."""

    family: ClassVar[str] = "mmdit"

    modulation: Literal["block", "single"] = "block"  # ty: ignore[incompatible-attribute-override]
    """AdaLN: a projection per block, or one shared projection plus a learned offset per
    block (AdaLN-single).
    """
    pooled_text: bool = True  # ty: ignore[incompatible-attribute-override]
    """Also adds the projected mean of the text embedding to the timestep embedding."""
    last_block_text: bool = False  # ty: ignore[incompatible-attribute-override]
    """Gives the last block a full text stream, whose output nothing reads (kept where a
    published parameter count has it).
    """

    def _check_fields(self) -> None:
        super()._check_fields()
        check_choices(self, "model.", "modulation", "pooled_text", "last_block_text")


def tiny() -> MMDiTConfig:
    return MMDiTConfig()


def seaweed_8b() -> MMDiTConfig:
    """The 8B shape of the APT paper: 36 * (2*4*d^2 + 2*8*d^2) = 8.15e9 weights in the
    layers, plus embeddings.
    """
    return MMDiTConfig(
        depth=36,
        width=3072,
        heads=24,
        latent_channels=16,
        text_width=4096,
        modulation="single",
        last_block_text=True,
        dtype="bfloat16",
        recompute="full",
    )
