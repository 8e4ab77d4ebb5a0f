"""Shape of the diffusion transformer."""

import math
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Fp8Config:
    """FP8 matrix products in the blocks, with Transformer Engine on a chip that has them."""

    recipe: Literal["none", "current", "delayed", "blockwise", "mxfp8"] = "none"
    """current: one scale per tensor, from the tensor. delayed: from the largest values of recent updates, which saves a pass over each tensor.
    blockwise: a scale per 128 numbers (Hopper). mxfp8: per 32 (Blackwell)."""
    bf16_first: int = 1
    """Blocks at the start that stay in bf16."""
    bf16_last: int = 1
    history: int = 16
    """delayed: updates whose largest value makes the scale."""
    margin: int = 0
    """delayed: powers of two of headroom."""

    def __post_init__(self):
        for name in ("bf16_first", "bf16_last", "margin"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.fp8.{name}={getattr(self, name)}: must not be negative")
        if self.history < 1:
            raise ValueError(f"model.fp8.history={self.history}: must be at least 1")

    @property
    def row_multiple(self) -> int:
        """Rows that an FP8 product wants on each rank."""
        return {"none": 1, "mxfp8": 32}.get(self.recipe, 16)


@dataclass(frozen=True)
class WanConfig:
    """What only Wan has."""

    cross_norm: bool = True
    """A norm with learned scale and shift before the text's cross-attention."""
    image_width: int = 0
    """Width of the first frame's CLIP tokens, which a second cross-attention reads (Wan2.1 I2V); 0: there are none."""
    image_tokens: int = 257


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a diffusion transformer of any family. Defaults are the `tiny` preset, which trains on a CPU in minutes."""

    family: Literal["mmdit", "wan"] = "mmdit"
    """mmdit: separate text and visual weights in every layer, joint attention. wan: self-attention, then cross-attention to the text.
    Both rotate visual queries and keys by their place in the video."""
    depth: int = 6
    width: int = 64
    heads: int = 4
    mlp_ratio: int = 4
    mlp_width: int = 0
    """Of the blocks' MLPs; 0: mlp_ratio * width."""
    latent_channels: int = 4
    condition_channels: int = 0
    """Further input channels that are given, not generated (the first frame and its mask in Wan I2V)."""
    patch: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns that make one token."""
    text_width: int = 32
    """Width of the text encoder's output."""
    modulation: Literal["block", "single"] = "block"
    """AdaLN: a projection per block, or one shared projection plus a learned offset per block (AdaLN-single)."""
    pooled_text: bool = True
    """Also adds the projected mean of the text embedding to the timestep embedding."""
    last_block_text: bool = False
    """Gives the last block a full text stream, whose output nothing reads (kept where a published parameter count has it)."""
    rope_theta: float = 10000.0
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    recompute: Literal["none", "full"] = "none"
    """`full` keeps only each block's input and runs the block again in the backward pass."""
    fp8: Fp8Config = Fp8Config()
    wan: WanConfig = WanConfig()

    def __post_init__(self):
        for name in ("depth", "width", "heads", "mlp_ratio", "latent_channels", "text_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be at least 1")
        for name in ("mlp_width", "condition_channels"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name}={getattr(self, name)}: must not be negative")
        if self.family == "wan" and (self.modulation != "single" or self.pooled_text):
            raise ValueError(
                f"model.family='wan' has model.modulation='single' and no model.pooled_text; here they are {self.modulation!r} and {self.pooled_text}"
            )
        if min(self.patch) < 1:
            raise ValueError(f"model.patch={self.patch}: each side must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"model.width={self.width} does not split into model.heads={self.heads}; use a multiple")
        if (self.width // self.heads) % 2 or self.width // self.heads < 6:
            raise ValueError(f"model.width={self.width} / model.heads={self.heads}: rotary embedding in 3D needs an even head size of at least 6")

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def mlp(self) -> int:
        """Width of the blocks' MLPs."""
        return self.mlp_width or self.mlp_ratio * self.width

    @property
    def rotary(self) -> bool:
        """Positions turn queries and keys."""
        return True

    @property
    def patch_width(self) -> int:
        """Numbers of one visual token of a latent."""
        return self.latent_channels * math.prod(self.patch)

    @property
    def input_width(self) -> int:
        """Numbers of one visual token before embedding."""
        return (self.latent_channels + self.condition_channels) * math.prod(self.patch)


def tiny() -> ModelConfig:
    return ModelConfig()


def seaweed_8b() -> ModelConfig:
    """The 8B shape of the APT paper: 36 * (2*4*d^2 + 2*8*d^2) = 8.15e9 weights in the layers, plus embeddings."""
    return ModelConfig(
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


def wan_1_3b() -> ModelConfig:
    """Wan2.1-T2V-1.3B."""
    return ModelConfig(
        family="wan",
        depth=30,
        width=1536,
        heads=12,
        mlp_width=8960,
        latent_channels=16,
        text_width=4096,
        modulation="single",
        pooled_text=False,
        dtype="bfloat16",
        recompute="full",
    )


def wan_14b() -> ModelConfig:
    """Wan2.1-T2V-14B, and each of the two networks of Wan2.2-T2V-A14B."""
    return replace(wan_1_3b(), depth=40, width=5120, heads=40, mlp_width=13824)


def wan_14b_i2v() -> ModelConfig:
    """Wan2.1-I2V-14B: the first frame as latent and mask on further channels, and as CLIP tokens."""
    return replace(wan_14b(), condition_channels=20, wan=WanConfig(image_width=1280))
