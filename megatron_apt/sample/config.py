"""Settings of `megatron-apt sample`, which say themselves what does not fit, before a model is loaded."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

MOST_POSITIONS = 1 << 24  # latent positions of a sample: 2 s of 1280x720 are 46,800 tokens, 187,200 positions
MOST_SIDE = 16384  # pixels of a picture that is written


@dataclass(frozen=True)
class SampleConfig:
    """Settings of `megatron-apt sample`."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder or iteration-* folder."""
    prompts: tuple[str, ...] = ()
    """One sample is made of each prompt for each seed; quote a prompt that has spaces.
    Empty: the dataset's first captions.
    """
    image: str = ""
    """Image-to-video: picture (or video) whose first frame every prompt starts from,
    covered and cropped to the sample's size; empty: the dataset's first captions start
    from their own first frames. A model with model.first_frame makes samples of one
    latent frame from text.
    """
    seeds: tuple[int, ...] = (0,)
    steps: int = 1
    """1: G(z). 2: the zero-shot two-step procedure of models trained for one step. N, and
    with any other model: Euler steps.
    """
    guidance: float = 1.0
    """Classifier-free guidance scale of the Euler sampler (each step then costs two evaluations)."""
    euler: bool = False
    """Use Euler also for 1 or 2 steps."""
    weights: Literal["ema", "raw"] = "ema"
    negative_prompt: str = ""
    size: tuple[int, int, int] | tuple[()] = ()
    """Latent frames, rows, columns; empty: the size of the dataset's first sample."""
    dataset: str = ""
    """Encoded dataset whose text encoder and codec are used; empty: the one the run was trained on."""
    decode_tiling: int | None = None
    """VAEs: side in pixels of the tiles that are decoded one after the other, which saves
    memory; 0: whole. None: as the dataset was encoded.
    """
    format: Literal["png", "gif", "mp4"] = "png"
    fps: float | None = None
    """Frames per second of gif and mp4. None: what the dataset was encoded at, or 8 where
    it kept its sources' frames.
    """
    scale: int = 1
    """Integer enlargement of the pictures."""
    out: str = "samples"

    def __post_init__(self):
        for i, prompt in enumerate((*self.prompts, self.negative_prompt)):
            name = f"prompts[{i}]" if i < len(self.prompts) else "negative_prompt"
            _check(
                _is_text(prompt),
                name,
                ascii(prompt)[:80],
                "holds bytes that are not UTF-8; write it in UTF-8",
            )
        _check(bool(self.seeds), "seeds", self.seeds, "give at least one")
        _check(
            all(0 <= seed < 2**63 for seed in self.seeds), "seeds", self.seeds, "seeds lie in 0 .. 2^63 - 1"
        )
        _check(1 <= self.steps <= 10_000, "steps", self.steps, "give 1 to 10,000")
        _check(
            math.isfinite(self.guidance), "guidance", self.guidance, "give a number; 1 is without guidance"
        )
        _check(
            all(n >= 1 for n in self.size),
            "size",
            self.size,
            "latent frames, rows and columns are at least 1",
        )
        positions = math.prod(self.size)
        _check(
            positions <= MOST_POSITIONS,
            "size",
            self.size,
            f"is {positions:,} latent positions, more than {MOST_POSITIONS:,}; give a smaller one",
        )
        _check(
            self.decode_tiling is None or self.decode_tiling >= 0,
            "decode_tiling",
            self.decode_tiling,
            "is a side in pixels; 0 for none",
        )
        _check(
            self.fps is None or 0 < self.fps <= 1000,
            "fps",
            self.fps,
            "give frames per second above 0, up to 1000",
        )
        _check(
            1 <= self.scale <= MOST_SIDE, "scale", self.scale, f"give a whole number from 1 to {MOST_SIDE}"
        )

    @property
    def plain(self) -> bool:
        """Neither Euler asked for nor guidance."""
        return not self.euler and self.guidance == 1.0


def _check(good: bool, field: str, value: object, remedy: str) -> None:
    if not good:
        raise ValueError(f"{field}={value!r}: {remedy}")


def _is_text(prompt: str) -> bool:
    return not any(0xD800 <= ord(c) < 0xE000 for c in prompt)
