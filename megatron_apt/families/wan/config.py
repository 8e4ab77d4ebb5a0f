"""Shape of a Wan 2.1 or 2.2 (dense)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from megatron_apt.models.checks import WIDEST, check_choices, check_whole
from megatron_apt.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class WanConfig(ModelConfig):
    """Self-attention, then cross-attention to the text; one modulation for all blocks."""

    family: ClassVar[str] = "wan"
    modulation: ClassVar[Literal["block", "single"]] = "single"
    pooled_text: ClassVar[bool] = False
    text_padding: ClassVar[int | None] = 512
    codec: ClassVar[str] = "wan"
    given_channels: ClassVar[bool] = True

    cross_norm: bool = True
    """A norm with learned scale and shift before the text's cross-attention."""
    image_width: int = 0
    """Width of the first frame's CLIP tokens, which a second cross-attention reads
    (Wan2.1 I2V); 0: there are none.
    """
    image_tokens: int = 257
    first_frame: bool = False  # ty: ignore[incompatible-attribute-override]
    """A clip's first latent frame is given: clean and at time 0 among the noisy ones
    (Wan2.2 TI2V as image to video). The weights are those of text to video, so this is a
    recipe's choice. Samples of one frame are pictures, generated from text.
    """

    def _check_fields(self) -> None:
        super()._check_fields()
        check_choices(self, "model.", "cross_norm", "first_frame")
        check_whole(self, "model.", 0, WIDEST, "image_width", "image_tokens")

    def _check_family(self) -> None:
        if self.first_frame and self.patch[0] != 1:
            raise ValueError(
                f"model.first_frame=True needs patches of one frame; here is model.patch={self.patch}"
            )

    @property
    def image_shape(self) -> tuple[int, int] | None:
        return (self.image_tokens, self.image_width) if self.image_width else None

    @property
    def widths(self) -> dict[str, int]:
        return super().widths | {"image tokens": self.image_width}

    def block_flops(self, visual: int, text: int) -> float:
        """Visual tokens attend to each other and then to the text, which is only
        projected to keys and values.
        """
        d = self.width
        products = visual * (6 * d + 2 * self.mlp) + text * 2 * d
        return 2 * d * products + 4 * d * visual * (visual + text)


def wan_1_3b() -> WanConfig:
    """Wan2.1-T2V-1.3B."""
    return WanConfig(
        depth=30,
        width=1536,
        heads=12,
        mlp_width=8960,
        latent_channels=16,
        text_width=4096,
        dtype="bfloat16",
        recompute="full",
    )


def wan_5b() -> WanConfig:
    """Wan2.2-TI2V-5B as text to video; its latents have 48 channels and are 16 times
    smaller than the picture.
    """
    return replace(wan_1_3b(), width=3072, heads=24, mlp_width=14336, latent_channels=48)


def wan_5b_i2v() -> WanConfig:
    """Wan2.2-TI2V-5B as image to video, with the same weights."""
    return replace(wan_5b(), first_frame=True)


def wan_14b() -> WanConfig:
    """Wan2.1-T2V-14B, and each of the two networks of Wan2.2-T2V-A14B."""
    return replace(wan_1_3b(), depth=40, width=5120, heads=40, mlp_width=13824)


def wan_14b_i2v() -> WanConfig:
    """Wan2.1-I2V-14B: the first frame as latent and mask on further channels, and as CLIP tokens."""
    return replace(wan_14b(), condition_channels=20, image_width=1280)
