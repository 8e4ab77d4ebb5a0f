"""Shape of a diffusion transformer: what all families have, and what the rest of the package asks of any.

A family's own fields, checks and presets are in families/NAME/config.py, as a subclass.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_apt.models.checks import (
    DEEPEST,
    WIDEST,
    check_choices,
    check_number,
    check_tuples,
    check_whole,
)
from megatron_apt.moved import names_of

__getattr__ = names_of(__name__)

# Of a model that a file describes: ten times those of any published one, and built
# without memory in seconds
MOST_BLOCKS = 1000

Dtype = Literal["float32", "bfloat16", "float64"]
Recipe = Literal["none", "current", "delayed", "blockwise", "mxfp8"]


@dataclass(frozen=True)
class Fp8Config:
    """FP8 matrix products in the blocks, with Transformer Engine on a chip that has them."""

    recipe: Recipe = "none"
    """current: one scale per tensor, from the tensor. delayed: from the largest values of
    recent updates, which saves a pass over each tensor. blockwise: a scale per 128
    numbers (Hopper). mxfp8: per 32 (Blackwell).
    """
    bf16_first: int = 1
    """Blocks at the start that stay in bf16."""
    bf16_last: int = 1
    history: int = 16
    """delayed: updates whose largest value makes the scale."""
    margin: int = 0
    """delayed: powers of two of headroom."""

    def __post_init__(self):
        check_whole(self, "model.fp8.", 0, DEEPEST, "bf16_first", "bf16_last", "margin")
        check_whole(self, "model.fp8.", 1, WIDEST, "history")
        check_choices(self, "model.fp8.", "recipe")

    @property
    def row_multiple(self) -> int:
        """Rows that an FP8 product wants on each rank."""
        return {"none": 1, "mxfp8": 32}.get(self.recipe, 16)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a diffusion transformer. Defaults train on a CPU in minutes. One without a
    family is not chosen yet (see training/fit.py).

    Attributes:
        family: its name in families/registry.py, by which configurations are stored.
        modulation: AdaLN: a projection per block, or one shared projection plus a learned
            offset per block (AdaLN-single).
        pooled_text: the projected mean of the text, or its encoder's pooled text, is
            added to the timestep embedding.
        last_block_text: the last block has a full text stream, whose output nothing reads.
        rotary: positions turn queries and keys.
        qk_norm: queries and keys are normalised.
        first_frame: a clip's first latent frame is given, clean and at time 0.
        guidance: the scale of guidance that it is told; 0: it has no such input.
        text_padding: tokens that the family's pipelines pad captions to; 0: the model
            reads no padding; None: it has no pipelines.
        codec: of its pipelines, by its name in `encode`.
        pictures: its pipelines make pictures, not clips.
        given_channels: some of its models read a first frame on further input channels.
    """

    family: ClassVar[str] = ""
    modulation: ClassVar[Literal["block", "single"]] = "block"
    pooled_text: ClassVar[bool] = True
    last_block_text: ClassVar[bool] = False
    rotary: ClassVar[bool] = True
    qk_norm: ClassVar[bool] = True
    first_frame: ClassVar[bool] = False
    guidance: ClassVar[float] = 0.0
    text_padding: ClassVar[int | None] = None
    codec: ClassVar[str] = "pixel"
    pictures: ClassVar[bool] = False
    given_channels: ClassVar[bool] = False

    depth: int = 6
    width: int = 64
    heads: int = 4
    mlp_ratio: int = 4
    mlp_width: int = 0
    """Of the blocks' MLPs; 0: mlp_ratio * width."""
    latent_channels: int = 0
    """0: those of the run's dataset."""
    condition_channels: int = 0
    """Further input channels that are given, not generated (the first frame and its mask)."""
    patch: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns that make one token."""
    text_width: int = 0
    """Width of the text encoder's output; 0: that of the run's dataset."""
    rope_theta: float = 10000.0
    dtype: Dtype = "float32"
    recompute: Literal["none", "full"] = "none"
    """`full` keeps only each block's input and runs the block again in the backward pass."""
    fp8: Fp8Config = Fp8Config()

    def __post_init__(self):
        self._check_fields()
        if min(self.patch) < 1:
            raise ValueError(f"model.patch={self.patch}: each side must be at least 1")
        if self.width % self.heads:
            raise ValueError(
                f"model.width={self.width} does not split into model.heads={self.heads}; use a multiple"
            )
        if self.rotary and (self.head_size % 2 or self.head_size < 6):
            raise ValueError(
                f"model.width={self.width} / model.heads={self.heads}: rotary embedding in 3D needs an even "
                "head size of at least 6"
            )
        self._check_family()

    def _check_fields(self) -> None:
        """Each by itself. Families add theirs."""
        check_whole(self, "model.", 1, DEEPEST, "depth")
        check_whole(self, "model.", 1, WIDEST, "width", "heads", "mlp_ratio")
        check_whole(self, "model.", 0, WIDEST, "mlp_width", "condition_channels")
        check_whole(self, "model.", 0, WIDEST, "latent_channels", "text_width")
        check_tuples(self, "model.", patch=3)
        if max(self.patch) > DEEPEST or self.mlp > 10 * WIDEST:
            raise ValueError(
                f"model.patch={self.patch}, MLPs {self.mlp} wide: no side is above {DEEPEST}, and no MLP "
                f"wider than {10 * WIDEST}"
            )
        check_choices(self, "model.", "dtype", "recompute")
        check_number(self.rope_theta, "model.rope_theta", 1e-6)

    def _check_family(self) -> None:
        """How a family's fields must fit each other."""

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def mlp(self) -> int:
        """Width of the blocks' MLPs."""
        return self.mlp_width or self.mlp_ratio * self.width

    @property
    def blocks(self) -> int:
        """All that there are, also those that are not counted in depth."""
        return self.depth

    @property
    def rotary_pairs(self) -> tuple[int, int, int]:
        """Pairs of numbers of a head turned by frame, row and column; what does not
        divide by three goes to frames.
        """
        pairs = self.head_size // 2
        return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text."""
        return self.text_width

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """Number and width of the tokens of a given first frame; None: it reads none."""
        return None

    @property
    def image_to_video(self) -> bool:
        """It is given first frames of clips, in one way or another."""
        return bool(self.condition_channels or self.image_shape or self.first_frame)

    @property
    def patch_width(self) -> int:
        """Numbers of one visual token of a latent."""
        return self.latent_channels * math.prod(self.patch)

    @property
    def input_width(self) -> int:
        """Numbers of one visual token before embedding."""
        return (self.latent_channels + self.condition_channels) * math.prod(self.patch)

    @property
    def widths(self) -> dict[str, int]:
        """Every width of which weights are made, by what it is."""
        return {
            "width": self.width,
            "MLPs": self.mlp,
            "text": self.text_width,
            "pooled text": self.pooled_width,
            "input": self.input_width,
        }

    def block_flops(self, visual: int, text: int) -> float:
        """Of one block's forward pass over one sample of so many tokens: 2 for each
        weight and token, and 4 D of attention for each query and key. All attend to all.
        """
        d, tokens = self.width, visual + text
        return 2 * d * tokens * (4 * d + 2 * self.mlp) + 4 * d * tokens**2
