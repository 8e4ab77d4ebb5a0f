"""What a person sees while a run trains: on a terminal a progress bar, else lines."""

import contextlib
from collections.abc import Generator, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from megatron_apt.config import RunConfig
from megatron_apt.training.train import Report


def summary(values: dict[str, float], shown: Sequence[str]) -> str:
    """The few numbers worth a line, e.g. `d/loss 1.2345  g/loss 0.8123`."""
    return "  ".join(f"{name} {values[name]:.4f}" for name in shown if name in values)


@contextlib.contextmanager
def training_progress(config: RunConfig, enabled: bool = True, label: str = "") -> Generator[Report]:
    """Yields a reporter for `train`. Losses are printed every config.log_every
    iterations; the bar moves at each.
    """
    if not enabled:
        yield lambda iteration, values: None
        return
    console = Console(soft_wrap=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label or config.output, total=config.iterations)

        def report(iteration: int, values: dict[str, float]) -> None:
            bar.update(task, completed=iteration)
            if iteration % config.log_every == 0 or iteration == config.iterations:
                line = (
                    f"{label or config.method} {iteration}/{config.iterations}",
                    summary(values, config.of_method.shown),
                    f"{values['seconds']:.3f} s",
                )
                console.print("  ".join(line), highlight=False)

        yield report
