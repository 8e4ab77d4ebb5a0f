"""Settings of flow matching."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_apt.errors import require
from megatron_apt.methods.config import MethodConfig


@dataclass(frozen=True)
class FlowConfig(MethodConfig):
    """Stage 0: flow matching."""

    tags: ClassVar = ("flow-matching",)

    condition_dropout: float = 0.1
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    """Shift of the logit-normal t towards noise (method: shift(t, s))."""

    def __post_init__(self):
        require(
            0 <= self.condition_dropout <= 1,
            "flow.condition_dropout",
            self.condition_dropout,
            "is a probability",
        )
        require(self.logit_std >= 0, "flow.logit_std", self.logit_std, "must not be negative")
        require(self.shift > 0, "flow.shift", self.shift, "must be positive; 1 leaves t as it is")
