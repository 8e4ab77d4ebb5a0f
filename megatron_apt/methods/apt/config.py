"""Settings of adversarial post-training."""

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from megatron_apt.errors import require
from megatron_apt.methods.config import MethodConfig

if TYPE_CHECKING:
    from megatron_apt.config import RunConfig


@dataclass(frozen=True)
class AptConfig(MethodConfig):
    """Stage 2: adversarial post-training. Every ablation of the paper is a change of one field."""

    one_step: ClassVar = True
    critic: ClassVar = "discriminator"
    needs: ClassVar = ("generator", "diffusion")
    shown: ClassVar = (
        "d/loss",
        "g/loss",
        "d/ar1",
        "d/logit_gap",
        "d/accuracy",
        "sample/diversity",
    )
    tags: ClassVar = ("one-step", "adversarial-post-training")

    loss: Literal["non_saturating", "hinge", "relativistic"] = "non_saturating"
    ar1_lambda: float = 100.0
    ar1_sigma: float = 0.01
    """In units of the scaled latent: 0.01 for images, 0.1 for videos."""
    ar2_lambda: float = 0.0
    ar2_sigma: float = 0.01
    timestep_shift: float = 1.0
    """s of the discriminator's t ~ shift(U(0, 1), s): 1 for images, 12 for videos."""
    timestep_fixed: float = -1.0
    """>= 0 gives the discriminator this t always; t = 0 is the collapse case of the paper."""
    discriminator_depth: float = 1.0
    """Share of the backbone's layers the discriminator keeps."""
    head_layers: tuple[float, ...] = (16 / 36, 26 / 36, 1.0)
    """Depths of the query heads, as fractions of the discriminator's layers, counted after the block."""
    train_backbone: bool = True
    """False freezes the discriminator's backbone and trains heads only (LADD, not APT)."""
    discriminator_init: Literal["diffusion", "distilled"] = "diffusion"
    discriminator_lr: float = 0.0
    """0 takes optimizer.lr."""
    discriminator_warmup: int = 0
    """Updates of linear warm-up of the discriminator; optimizer.warmup is the
    generator's. A longer one for the generator lets a discriminator whose heads start
    from nothing learn before it is followed.
    """
    head_lr_scale: float = 1.0
    unmatched_conditions: bool = False
    """Also shows the discriminator real samples with another sample's condition, as fakes."""
    condition_dropout: float = 0.0
    reuse_fakes: bool = False
    """Each generator update takes up the fakes of the discriminator update before it
    (same samples, noise and dropout), whose forward pass a pipeline then runs once for
    both, as far as memory allows. NOT the same training: G learns on fakes that D has
    just been trained on.
    """
    two_step_t: float = 0.5
    exact_r1_every: int = 0
    """Every so many iterations compute the exact R1 penalty beside aR1 (small scale only); 0 never."""

    def __post_init__(self):
        require(self.ar1_lambda >= 0, "apt.ar1_lambda", self.ar1_lambda, "must not be negative")
        for name in ("ar2_lambda", "discriminator_lr", "discriminator_warmup", "exact_r1_every"):
            require(getattr(self, name) >= 0, f"apt.{name}", getattr(self, name), "must not be negative")
        for name in ("ar1_sigma", "ar2_sigma", "timestep_shift", "head_lr_scale"):
            require(getattr(self, name) > 0, f"apt.{name}", getattr(self, name), "must be positive")
        for name in ("condition_dropout", "two_step_t"):
            require(0 <= getattr(self, name) <= 1, f"apt.{name}", getattr(self, name), "lies in [0, 1]")
        unpaired = self.loss != "relativistic"
        require(
            unpaired or not self.unmatched_conditions,
            "apt.unmatched_conditions",
            True,
            "has no paired form; use another apt.loss",
        )
        require(
            0 < self.discriminator_depth <= 1,
            "apt.discriminator_depth",
            self.discriminator_depth,
            "is a share in (0, 1]",
        )
        require(
            bool(self.head_layers) and all(0 < f <= 1 for f in self.head_layers),
            "apt.head_layers",
            self.head_layers,
            "are fractions of depth in (0, 1]",
        )
        require(
            self.timestep_fixed <= 1,
            "apt.timestep_fixed",
            self.timestep_fixed,
            "t lies in [0, 1]; negative means the ensemble",
        )

    def discriminator_blocks(self, depth: int) -> int:
        """Blocks of the discriminator, of a model's `depth`."""
        return max(1, round(self.discriminator_depth * depth))

    def head_blocks(self, depth: int) -> tuple[int, ...]:
        """Blocks (from 1) after which the heads of a discriminator of so many stand:
        16/36, 26/36, 36/36 of 36 are 16, 26, 36.

        Raises:
            ValueError: two fractions fall on one block of so shallow a network.
        """
        blocks = tuple(max(1, round(fraction * depth)) for fraction in self.head_layers)
        if len(set(blocks)) != len(blocks):
            raise ValueError(
                f"apt.head_layers={self.head_layers} fall on blocks {blocks} of {depth}, some twice; give "
                "fewer or more distant fractions"
            )
        return tuple(sorted(blocks))

    def depths(self, depth: int) -> tuple[int, ...]:
        return depth, self.discriminator_blocks(depth)

    def check(self, run: "RunConfig") -> None:
        """Exact R1 differentiates a whole discriminator; diversity compares two samples."""
        every = f"apt.exact_r1_every={self.exact_r1_every}"
        if self.exact_r1_every and run.model.recompute == "full":
            raise ValueError(f"{every} differentiates with respect to samples; it needs model.recompute=none")
        if self.exact_r1_every and run.parallel.pp > 1:
            raise ValueError(
                f"{every} needs the whole discriminator on a rank; use parallel.pp=1 or set it to 0"
            )
        if run.micro_batch == 1 and run.guards.collapse_window:
            warnings.warn(
                "micro_batch=1 leaves no two samples to compare: the diversity alarm is off, only d/loss is "
                "watched",
                stacklevel=3,
            )

    def without_measuring(self) -> Self:
        return replace(self, exact_r1_every=0)

    def two_step_time(self, run: "RunConfig") -> float:
        return self.two_step_t

    def card_lines(self) -> tuple[str, ...]:
        return (f"loss `{self.loss}`, aR1 with sigma {self.ar1_sigma} and lambda {self.ar1_lambda}",)
