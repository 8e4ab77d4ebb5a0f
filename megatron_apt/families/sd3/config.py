"""Shape of a Stable Diffusion 3 or 3.5."""

from dataclasses import dataclass, replace
from typing import ClassVar

from megatron_apt.models.checks import DEEPEST, WIDEST, check_choices, check_tuples, check_whole, short
from megatron_apt.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Sd3Config(ModelConfig):
    """An MMDiT of pictures, whose tokens carry a table of positions."""

    family: ClassVar[str] = "sd3"
    rotary: ClassVar[bool] = False
    text_padding: ClassVar[int | None] = 77 + 256
    codec: ClassVar[str] = "kl"
    pictures: ClassVar[bool] = True

    pooled_width: int = 2048
    """Width of the pooled text, which its text encoders give for the whole caption."""
    position_size: int = 192
    """Rows and columns of the table of positions, in tokens; smaller pictures take its centre."""
    sample_size: int = 128
    """Rows and columns of a latent: over the whole table its angles grow from 0 to as
    many as such a latent has tokens in a row.
    """
    qk_norm: bool = False  # ty: ignore[incompatible-attribute-override]
    """RMSNorm of queries and keys (3.5)."""
    dual_layers: tuple[int, ...] = ()
    """Blocks (from 0) in which visual tokens also attend to each other alone (3.5 medium)."""

    def _check_fields(self) -> None:
        super()._check_fields()
        check_whole(self, "model.", 1, WIDEST, "pooled_width")
        check_whole(self, "model.", 1, DEEPEST, "position_size", "sample_size")
        check_choices(self, "model.", "qk_norm")
        check_tuples(self, "model.", dual_layers=None)

    def _check_family(self) -> None:
        if self.patch != (1, self.patch[1], self.patch[1]):
            raise ValueError(
                f"model.patch={self.patch}: model.family='sd3' has square patches of one frame, (1, p, p)"
            )
        if self.width % 4:
            raise ValueError(
                f"model.width={self.width}: positions of model.family='sd3' are sine and cosine of row and "
                "column; use a multiple of 4"
            )
        beyond = [i for i in self.dual_layers if not 0 <= i < self.depth]
        if beyond:
            raise ValueError(f"model.dual_layers names blocks {short(beyond)} of model.depth={self.depth}")
        if len(self.dual_layers) > self.depth:  # each block looks for itself in it
            raise ValueError(
                f"model.dual_layers names {len(self.dual_layers)} blocks of "
                f"model.depth={self.depth}; name each once"
            )


def sd3_medium() -> Sd3Config:
    """Stable Diffusion 3 medium (2B)."""
    return Sd3Config(
        depth=24,
        width=1536,
        heads=24,
        latent_channels=16,
        text_width=4096,
        dtype="bfloat16",
        recompute="full",
    )


def sd35_large() -> Sd3Config:
    """Stable Diffusion 3.5 large and large turbo (8B)."""
    return replace(sd3_medium(), depth=38, width=2432, heads=38, qk_norm=True)


def sd35_medium() -> Sd3Config:
    """Stable Diffusion 3.5 medium (2.5B, of which 0.2B are its table of positions)."""
    return replace(sd3_medium(), position_size=384, qk_norm=True, dual_layers=tuple(range(13)))
