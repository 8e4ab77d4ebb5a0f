"""The methods there are: a name and a field for each.

methods/NAME/config.py    its settings, a MethodConfig
methods/NAME/method.py    method(config, mesh), its networks and phases (see build.py)
"""

from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Literal, Self, get_args

from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.config import MethodConfig
from megatron_apt.methods.consistency.config import ConsistencyConfig
from megatron_apt.methods.flow.config import FlowConfig

MethodName = Literal["flow", "consistency", "apt"]
DEFAULT: MethodName = "apt"
PRETRAINING: MethodName = "flow"
"""Makes diffusion models, so an imported one counts as a result of it."""


@dataclass(frozen=True)
class MethodConfigs:
    """Which method a run trains by, and the settings of each. A recipe of one stage keeps
    those of the others, for recipes that are derived from it.
    """

    method: MethodName = DEFAULT
    _: KW_ONLY
    flow: FlowConfig = field(default_factory=FlowConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    apt: AptConfig = field(default_factory=AptConfig)

    @property
    def of_method(self) -> MethodConfig:
        """Settings of the method that is chosen."""
        return getattr(self, self.method)

    def without_measuring(self) -> Self:
        """The same run without what its method measures on the side."""
        return replace(self, **{self.method: self.of_method.without_measuring()})


METHODS: dict[str, type[MethodConfig]] = {
    name: type(getattr(MethodConfigs(), name)) for name in get_args(MethodName)
}
