"""What a training method's settings are made from, and what they tell the rest of the
system about it. Importing them takes no torch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:  # it is made of methods' settings
    from megatron_apt.config import RunConfig


@dataclass(frozen=True)
class MethodConfig:
    """Settings of one training method. The class says what every run of it has in common.

    Attributes:
        one_step: its result makes a sample in one evaluation, without guidance.
        sampled: the role that is its result: it is sampled and exported, and other runs
            start from its weights.
        critic: the role that an export may write beside it; empty: there is none.
        needs: fields of `init`; while one is empty, a network trains from random weights.
        shown: logged values that are printed while it runs.
        tags: of the model card of its result.
    """

    one_step: ClassVar[bool] = False
    sampled: ClassVar[str] = "generator"
    critic: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    shown: ClassVar[tuple[str, ...]] = ("loss",)
    tags: ClassVar[tuple[str, ...]] = ()

    def depths(self, depth: int) -> tuple[int, ...]:
        """Blocks of each of its networks, where the model has so many."""
        return (depth,)

    def check(self, run: "RunConfig") -> None:
        """Compares these settings with the run's others.

        Raises:
            ValueError: naming the fields, the values and the remedy.
        """

    def without_measuring(self) -> Self:
        """The same networks and training, without what is measured on the side."""
        return self

    def two_step_time(self, run: "RunConfig") -> float:
        """The t at which two-step sampling of its result returns to noise."""
        return 0.5

    def card_lines(self) -> tuple[str, ...]:
        """What a model card tells of these settings, a line each."""
        return ()
