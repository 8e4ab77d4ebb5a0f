"""Shape of the diffusion transformer."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args, get_type_hints

# Of a model that a file describes: ten times those of any published one, and built
# without memory in seconds
MOST_BLOCKS = 1000
# Of which no honest model comes near; beyond them shapes overflow, and loops over blocks
# take for ever
_DEEPEST, _WIDEST = 10**4, 10**6


def _short(value: object) -> str:
    """As Python writes it, cut where a damaged file has put a long one."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _whole(config: object, where: str, low: int, high: int, *names: str) -> None:
    """Raises ValueError for a field that is no whole number from low to high."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{where}{name}={_short(value)}: must be a whole number")
        if value < low:
            raise ValueError(
                f"{where}{name}={value}: must {f'be at least {low}' if low else 'not be negative'}"
            )
        if value > high:
            raise ValueError(
                f"{where}{name}={value if value < 2**64 else 'of many digits'}: must be at most {high}"
            )


def _tuples(config: object, where: str, **lengths: int | None) -> None:
    """Raises ValueError for a field that is no tuple of so many whole numbers (None: any number of them)."""
    for name, length in lengths.items():
        value = getattr(config, name)
        whole = isinstance(value, tuple) and all(
            isinstance(part, int) and not isinstance(part, bool) for part in value
        )
        if not whole or (length is not None and len(value) != length):
            raise ValueError(
                f"{where}{name}={_short(value)}: must be {'a list of' if length is None else length} whole "
                "numbers"
            )
        if len(value) > _DEEPEST:
            raise ValueError(f"{where}{name}: has {len(value)} numbers; must have at most {_DEEPEST}")
        if any(not abs(part) <= _WIDEST for part in value):
            raise ValueError(
                f"{where}{name}={_short(value) if max(map(abs, value)) < 2**64 else 'of many digits'}: must "
                f"be at most {_WIDEST}"
            )


def _choices(config: object, where: str, *names: str) -> None:
    """Raises ValueError for a field whose value is none of those that its type lists, or
    is no bool where it is one.
    """
    hints = get_type_hints(type(config))
    for name in names:
        value, choices = getattr(config, name), get_args(hints[name]) or (True, False)
        if not isinstance(value, type(choices[0])) or value not in choices:
            raise ValueError(f"{where}{name}={_short(value)}: use {', '.join(map(repr, choices))}")


def _number(value: object, name: str, low: float) -> None:
    """Raises ValueError for what is no finite number of at least low."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < math.inf:
        raise ValueError(
            f"{name}={_short(value)}: must be a finite number, "
            f"{'not negative' if low == 0 else f'at least {low:g}'}"
        )


@dataclass(frozen=True)
class Fp8Config:
    """FP8 matrix products in the blocks, with Transformer Engine on a chip that has them."""

    recipe: Literal["none", "current", "delayed", "blockwise", "mxfp8"] = "none"
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
        _whole(self, "model.fp8.", 0, _DEEPEST, "bf16_first", "bf16_last", "margin")
        _whole(self, "model.fp8.", 1, _WIDEST, "history")
        _choices(self, "model.fp8.", "recipe")

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
    """Width of the first frame's CLIP tokens, which a second cross-attention reads
    (Wan2.1 I2V); 0: there are none.
    """
    image_tokens: int = 257
    first_frame: bool = False
    """A clip's first latent frame is given: clean and at time 0 among the noisy ones
    (Wan2.2 TI2V as image to video). The weights are those of text to video, so this is a
    recipe's choice. Samples of one frame are pictures, generated from text.
    """

    def __post_init__(self):
        _choices(self, "model.wan.", "cross_norm", "first_frame")
        _whole(self, "model.wan.", 0, _WIDEST, "image_width", "image_tokens")


@dataclass(frozen=True)
class Sd3Config:
    """What only Stable Diffusion 3 and 3.5 have."""

    pooled_width: int = 2048
    """Width of the pooled text, which its text encoders give for the whole caption."""
    position_size: int = 192
    """Rows and columns of the table of positions, in tokens; smaller pictures take its centre."""
    sample_size: int = 128
    """Rows and columns of a latent: over the whole table its angles grow from 0 to as
    many as such a latent has tokens in a row.
    """
    qk_norm: bool = False
    """RMSNorm of queries and keys (3.5)."""
    dual_layers: tuple[int, ...] = ()
    """Blocks (from 0) in which visual tokens also attend to each other alone (3.5 medium)."""

    def __post_init__(self):
        _whole(self, "model.sd3.", 1, _WIDEST, "pooled_width")
        _whole(self, "model.sd3.", 1, _DEEPEST, "position_size", "sample_size")
        _choices(self, "model.sd3.", "qk_norm")
        _tuples(self, "model.sd3.", dual_layers=None)


@dataclass(frozen=True)
class SingleStreamConfig:
    """What Flux and HunyuanVideo have in common."""

    double_blocks: int = 0
    """Blocks with separate weights for text and visual tokens; in those after them both share one set."""
    pooled_width: int = 768
    """Width of the pooled text, which CLIP gives for the whole caption."""
    rope_axes: tuple[int, int, int] = (16, 56, 56)
    """Numbers of a head that frame, row and column turn."""
    guidance: float = 0.0
    """The scale of guidance that the model is told, which its pipeline calls
    guidance_scale; 0: a model without that input.
    """

    def __post_init__(self):
        _whole(self, "", 0, _DEEPEST, "double_blocks")
        _whole(self, "", 1, _WIDEST, "pooled_width")
        _number(self.guidance, "guidance", 0)
        _tuples(self, "", rope_axes=3)
        if any(axis < 2 or axis % 2 for axis in self.rope_axes):
            raise ValueError(
                f"rope_axes={self.rope_axes}: each must be even and at least 2, because pairs of numbers turn"
            )


@dataclass(frozen=True)
class FluxConfig(SingleStreamConfig):
    """What Flux has."""

    double_blocks: int = 19
    guidance: float = 3.5


@dataclass(frozen=True)
class HunyuanConfig(SingleStreamConfig):
    """What HunyuanVideo has."""

    double_blocks: int = 20
    guidance: float = 6.0
    refiner_blocks: int = 2
    """Of the small transformer that reads the text first."""

    def __post_init__(self):
        super().__post_init__()
        _whole(self, "", 0, _DEEPEST, "refiner_blocks")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a diffusion transformer of any family. Defaults are the `tiny` preset,
    which trains on a CPU in minutes.
    """

    family: Literal["mmdit", "wan", "sd3", "flux", "hunyuan"] = "mmdit"
    """mmdit: separate text and visual weights in every layer, joint attention. wan:
    self-attention, then cross-attention to the text. flux, hunyuan: mmdits whose later
    layers share their weights between text and visual tokens. These rotate visual queries
    and keys by their place in the video. sd3: an mmdit of pictures, whose tokens carry a
    table of positions instead.
    """
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
    """AdaLN: a projection per block, or one shared projection plus a learned offset per
    block (AdaLN-single).
    """
    pooled_text: bool = True
    """Also adds the projected mean of the text embedding, or the pooled text of its
    encoder, to the timestep embedding.
    """
    last_block_text: bool = False
    """Gives the last block a full text stream, whose output nothing reads (kept where a
    published parameter count has it).
    """
    rope_theta: float = 10000.0
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    recompute: Literal["none", "full"] = "none"
    """`full` keeps only each block's input and runs the block again in the backward pass."""
    fp8: Fp8Config = Fp8Config()
    wan: WanConfig = WanConfig()
    sd3: Sd3Config = Sd3Config()
    flux: FluxConfig = FluxConfig()
    hunyuan: HunyuanConfig = HunyuanConfig()

    def __post_init__(self):
        self._check_fields()
        if self.family == "wan" and (self.modulation != "single" or self.pooled_text):
            raise ValueError(
                "model.family='wan' has model.modulation='single' and no model.pooled_text; here they are "
                f"{self.modulation!r} and {self.pooled_text}"
            )
        if min(self.patch) < 1:
            raise ValueError(f"model.patch={self.patch}: each side must be at least 1")
        if self.wan.first_frame and (self.family != "wan" or self.patch[0] != 1):
            raise ValueError(
                "model.wan.first_frame=True needs model.family='wan' and patches of one frame; here are "
                f"{self.family!r} and model.patch={self.patch}"
            )
        if self.family == "sd3":
            self._check_sd3()
        if self.width % self.heads:
            raise ValueError(
                f"model.width={self.width} does not split into model.heads={self.heads}; use a multiple"
            )
        if self.rotary and (self.head_size % 2 or self.head_size < 6):
            raise ValueError(
                f"model.width={self.width} / model.heads={self.heads}: rotary embedding in 3D needs an even "
                "head size of at least 6"
            )
        if self.single_stream is not None:
            self._check_single_stream(self.single_stream)

    def _check_fields(self) -> None:
        """Each by itself."""
        _whole(self, "model.", 1, _DEEPEST, "depth")
        _whole(self, "model.", 1, _WIDEST, "width", "heads", "mlp_ratio", "latent_channels", "text_width")
        _whole(self, "model.", 0, _WIDEST, "mlp_width", "condition_channels")
        _tuples(self, "model.", patch=3)
        if max(self.patch) > _DEEPEST or self.mlp > 10 * _WIDEST:
            raise ValueError(
                f"model.patch={self.patch}, MLPs {self.mlp} wide: no side is above {_DEEPEST}, and no MLP "
                f"wider than {10 * _WIDEST}"
            )
        _choices(
            self, "model.", "family", "modulation", "pooled_text", "last_block_text", "dtype", "recompute"
        )
        _number(self.rope_theta, "model.rope_theta", 1e-6)

    def _check_sd3(self) -> None:
        if self.modulation != "block" or not self.pooled_text or self.last_block_text:
            raise ValueError(
                "model.family='sd3' has model.modulation='block', model.pooled_text and no "
                f"model.last_block_text; here they are {self.modulation!r}, {self.pooled_text} and "
                f"{self.last_block_text}"
            )
        if self.patch != (1, self.patch[1], self.patch[1]):
            raise ValueError(
                f"model.patch={self.patch}: model.family='sd3' has square patches of one frame, (1, p, p)"
            )
        if self.width % 4:
            raise ValueError(
                f"model.width={self.width}: positions of model.family='sd3' are sine and cosine of row and "
                "column; use a multiple of 4"
            )
        beyond = [i for i in self.sd3.dual_layers if not 0 <= i < self.depth]
        if beyond:
            raise ValueError(
                f"model.sd3.dual_layers names blocks {_short(beyond)} of model.depth={self.depth}"
            )
        if len(self.sd3.dual_layers) > self.depth:  # each block looks for itself in it
            raise ValueError(
                f"model.sd3.dual_layers names {len(self.sd3.dual_layers)} blocks of "
                f"model.depth={self.depth}; name each once"
            )

    def _check_single_stream(self, config: SingleStreamConfig) -> None:
        if self.modulation != "block" or not self.pooled_text or self.last_block_text:
            raise ValueError(
                f"model.family={self.family!r} has model.modulation='block', model.pooled_text and no "
                f"model.last_block_text; here they are {self.modulation!r}, {self.pooled_text} and "
                f"{self.last_block_text}"
            )
        if self.patch[1] != self.patch[2]:
            raise ValueError(
                f"model.patch={self.patch}: model.family={self.family!r} has as many rows as columns in a "
                "patch"
            )
        if config.double_blocks > self.depth:
            raise ValueError(
                f"model.{self.family}.double_blocks={config.double_blocks}: there are {self.depth} blocks in "
                "all (model.depth)"
            )
        if sum(config.rope_axes) != self.head_size:
            raise ValueError(
                f"model.{self.family}.rope_axes={config.rope_axes}: must add up to the {self.head_size} "
                "numbers of a head"
            )
        if self.mlp % self.heads:
            raise ValueError(
                f"model.mlp_width={self.mlp}: model.family={self.family!r} deals it out to "
                f"model.heads={self.heads}; use a multiple"
            )

    @property
    def single_stream(self) -> SingleStreamConfig | None:
        """What the families with single-stream blocks have in common; None of others."""
        return {"flux": self.flux, "hunyuan": self.hunyuan}.get(self.family)

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
        return self.family != "sd3"

    @property
    def rotary_pairs(self) -> tuple[int, int, int]:
        """Pairs of numbers of a head turned by frame, row and column; where a family does
        not say, what does not divide by three goes to frames.
        """
        if self.single_stream is not None:
            return tuple(axis // 2 for axis in self.single_stream.rope_axes)
        pairs = self.head_size // 2
        return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3

    @property
    def qk_norm(self) -> bool:
        """Queries and keys are normalised."""
        return self.family != "sd3" or self.sd3.qk_norm

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text."""
        own = self.sd3 if self.family == "sd3" else self.single_stream
        return self.text_width if own is None else own.pooled_width

    @property
    def image_to_video(self) -> bool:
        """It is given first frames of clips, in one of Wan's ways."""
        return bool(self.condition_channels or self.wan.image_width or self.wan.first_frame)

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
    """The 8B shape of the APT paper: 36 * (2*4*d^2 + 2*8*d^2) = 8.15e9 weights in the
    layers, plus embeddings.
    """
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


def wan_5b() -> ModelConfig:
    """Wan2.2-TI2V-5B as text to video; its latents have 48 channels and are 16 times
    smaller than the picture.
    """
    return replace(wan_1_3b(), width=3072, heads=24, mlp_width=14336, latent_channels=48)


def wan_5b_i2v() -> ModelConfig:
    """Wan2.2-TI2V-5B as image to video, with the same weights."""
    return replace(wan_5b(), wan=WanConfig(first_frame=True))


def wan_14b() -> ModelConfig:
    """Wan2.1-T2V-14B, and each of the two networks of Wan2.2-T2V-A14B."""
    return replace(wan_1_3b(), depth=40, width=5120, heads=40, mlp_width=13824)


def wan_14b_i2v() -> ModelConfig:
    """Wan2.1-I2V-14B: the first frame as latent and mask on further channels, and as CLIP tokens."""
    return replace(wan_14b(), condition_channels=20, wan=WanConfig(image_width=1280))


def sd3_medium() -> ModelConfig:
    """Stable Diffusion 3 medium (2B)."""
    return ModelConfig(
        family="sd3",
        depth=24,
        width=1536,
        heads=24,
        latent_channels=16,
        text_width=4096,
        dtype="bfloat16",
        recompute="full",
    )


def sd35_large() -> ModelConfig:
    """Stable Diffusion 3.5 large and large turbo (8B)."""
    return replace(sd3_medium(), depth=38, width=2432, heads=38, sd3=Sd3Config(qk_norm=True))


def sd35_medium() -> ModelConfig:
    """Stable Diffusion 3.5 medium (2.5B, of which 0.2B are its table of positions)."""
    return replace(sd3_medium(), sd3=Sd3Config(position_size=384, qk_norm=True, dual_layers=tuple(range(13))))


def flux_dev() -> ModelConfig:
    """FLUX.1 dev (12B): 19 double and 38 single blocks, told a scale of guidance."""
    return ModelConfig(
        family="flux",
        depth=57,
        width=3072,
        heads=24,
        latent_channels=16,
        text_width=4096,
        dtype="bfloat16",
        recompute="full",
    )


def flux_schnell() -> ModelConfig:
    """FLUX.1 schnell (12B), which is not told of guidance."""
    return replace(flux_dev(), flux=FluxConfig(guidance=0.0))


def hunyuan_video() -> ModelConfig:
    """HunyuanVideo (13B): 20 double and 40 single blocks."""
    return ModelConfig(
        family="hunyuan",
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
