"""What a report holds: samples, figures and curves, by the names under which the page shows them."""

from dataclasses import dataclass, field

from torch import Tensor

from megatron_apt.demo.machine import Machine

# Names that grids and table rows should use: the page explains them, orders columns by
# them, and takes its sentences and pictures from them.
REAL, DIFFUSION, DIFFUSION_1, CONSISTENCY, APT, APT_2 = METHODS = (
    "real",
    "diffusion 25 steps",
    "diffusion 1 step",
    "consistency 1 step",
    "APT 1 step",
    "APT 2 steps",
)
WITHOUT_AR1 = "APT 1 step, no aR1"
FLOOR = "real against real"


@dataclass(frozen=True)
class Row:
    """One line of a table; NaN is shown as a dash. Named as above where one of the names fits."""

    name: str
    frechet: float
    accuracy: float
    diversity: float
    nfe: float
    seconds_per_sample: float


@dataclass(frozen=True)
class Section:
    """Images or videos. Cell i of every grid, (N, 3, F, H, W) in [-1, 1], shows
    prompts[i]; repeated prompts (other seeds) share a line.

    curves: stage -> rows of its JSONL log; ablation: rows of the log without aR1.
    Everything may be empty or partly there.
    """

    name: str
    prompts: tuple[str, ...] = ()
    grids: dict[str, Tensor] = field(default_factory=dict)
    fps: float = 8.0
    table: tuple[Row, ...] = ()
    curves: dict[str, list[dict]] = field(default_factory=dict)
    ablation: list[dict] = field(default_factory=list)

    def __post_init__(self):
        for name, grid in self.grids.items():
            if grid.ndim != 5 or grid.shape[1] != 3 or len(grid) != len(self.prompts):
                raise ValueError(
                    f"grid {name!r} of {self.name} is {tuple(grid.shape)}; need ({len(self.prompts)} "
                    "prompts, 3, F, H, W)"
                )

    @property
    def rows(self) -> dict[str, Row]:
        return {row.name: row for row in self.table}


@dataclass(frozen=True)
class Report:
    """seconds: finished stage -> duration, in order; pending: stages still to come; trial:
    trained too little for its samples and figures to mean anything.
    """

    title: str
    sections: tuple[Section, ...]
    seconds: dict[str, float]
    config_text: str
    notes: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()
    trial: bool = False
    machine: Machine | None = None
