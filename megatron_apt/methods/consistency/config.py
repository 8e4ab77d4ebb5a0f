"""Settings of consistency distillation."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_apt.errors import require
from megatron_apt.methods.config import MethodConfig

if TYPE_CHECKING:
    from megatron_apt.config import RunConfig


@dataclass(frozen=True)
class ConsistencyConfig(MethodConfig):
    """Stage 1: discrete-time consistency distillation with guidance folded in."""

    one_step: ClassVar = True
    needs: ClassVar = ("diffusion",)
    tags: ClassVar = ("one-step", "consistency-distillation")

    steps: int = 32
    shift: float = 24.0
    guidance_scale: float = 7.5

    def __post_init__(self):
        require(
            self.shift > 0, "consistency.shift", self.shift, "must be positive; 1 leaves the grid uniform"
        )
        require(
            self.guidance_scale >= 0,
            "consistency.guidance_scale",
            self.guidance_scale,
            "must not be negative; 1 is no guidance",
        )
        require(self.steps >= 1, "consistency.steps", self.steps, "must be at least 1")

    def two_step_time(self, run: "RunConfig") -> float:
        """As the stage that follows has it, so that both are sampled in the same way."""
        return run.apt.two_step_t
