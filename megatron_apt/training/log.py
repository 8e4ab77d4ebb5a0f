"""Where a run's numbers go: JSONL always, TensorBoard by default, Weights & Biases only when asked for."""

import contextlib
import json
import math
import os
import stat
import warnings
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_apt.config import RunConfig, to_dict
from megatron_apt.files import Replacement, write_atomically
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.schema import convert, never_waiting

_LONGEST_LINE = 1 << 24  # bytes


class LogError(ValueError):
    """A log that cannot be read or written."""


class RunLog:
    """Writes a row per iteration to OUTPUT/log.jsonl, scalars to OUTPUT/tensorboard.

    Args:
        start: iteration the run starts or resumes at; later rows of an interrupted run,
            and lines that are no rows, go to log.discarded.jsonl.

    Raises:
        LogError: the files cannot be written.
    """

    def __init__(self, config: RunConfig, start: int):
        self.path = Path(config.output) / "log.jsonl"
        self._tensorboard = self._wandb = None
        with _named_failure(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _set_aside(self.path, start)
            self._file = open(self.path, "a", encoding="utf-8", opener=never_waiting)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with _named_failure(self.path.parent / "tensorboard"):
                self._tensorboard = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=start + 1)
        if config.wandb:
            self._wandb = _start_wandb(config)

    def row(self, iteration: int, values: Mapping[str, float], scalars: bool) -> None:
        """Appends a row; `scalars` also sends it to the dashboards.

        Raises:
            LogError: it could not be written.
        """
        with _named_failure(self.path):
            self._file.write(json.dumps({"iteration": iteration, **values}) + "\n")
            self._file.flush()
        if scalars and self._tensorboard:
            with _named_failure(self.path.parent / "tensorboard"):
                for name, value in values.items():
                    self._tensorboard.add_scalar(name, value, iteration)
        if scalars and self._wandb:
            self._wandb.log(dict(values), step=iteration)

    def close(self) -> None:
        """Flushes everything.

        Raises:
            LogError: something could not be written.
        """
        with _named_failure(self.path):
            self._file.close()
        if self._tensorboard:
            with _named_failure(self.path.parent / "tensorboard"):
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


@contextlib.contextmanager
def _named_failure(place: Path) -> Generator[None]:
    """Full disks, folders that were deleted: TensorBoard's thread passes such errors on as they are."""
    try:
        yield
    except OSError as error:
        raise LogError(
            f"{place}: cannot be written ({error.strerror or error}); free disk space or check the folder, "
            "then start again: training goes on from the last checkpoint"
        ) from error


def _set_aside(path: Path, start: int) -> None:
    """Moves what does not belong before iteration `start` + 1 from a log to
    `log.discarded.jsonl` beside it: nothing is lost, each row is once.
    """

    def belongs(line: bytes) -> bool:
        return line.endswith(b"\n") and (row := _row(line)) is not None and row["iteration"] <= start

    if all(map(belongs, _lines(path))):
        return
    with (
        open(path.with_name("log.discarded.jsonl"), "ab", opener=never_waiting) as discarded,
        Replacement(path) as kept,
    ):
        _check_plain(discarded, discarded.name)
        for line in _lines(path):
            file = kept.stream if belongs(line) else discarded
            file.write(line if line.endswith(b"\n") else line + b"\n")
        discarded.flush()
        os.fsync(discarded.fileno())
        kept.commit()


def _lines(path: Path) -> Iterator[bytes]:
    """Of a log, of which there may be none yet.

    Raises:
        LogError: it is no log, but a pipe, a device, or a file of one endless line.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb", opener=never_waiting) as stream:
            _check_plain(stream, path)
            while line := stream.readline(_LONGEST_LINE):
                if len(line) == _LONGEST_LINE:
                    raise LogError(
                        f"{path}: has a line of {_LONGEST_LINE} bytes and more, so it is no log; move it away"
                    )
                yield line
    except FileNotFoundError:
        return


def _check_plain(stream: IO, path: str | Path) -> None:
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        raise LogError(f"{path}: is no plain file; move it away")


def _row(line: bytes) -> dict[str, float] | None:
    """A row of a log; None for anything else."""
    try:
        row = convert(json.loads(line), dict[str, float], "", remedy="")
    except (ValueError, RecursionError):
        return None
    iteration = row.get("iteration", -1.0)
    return (
        row | {"iteration": int(iteration)}
        if 0 <= iteration < 2**53 and iteration == int(iteration)
        else None
    )


def _start_wandb(config: RunConfig):
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            f"wandb={config.wandb!r} asks for Weights & Biases, which is not installed: pip install wandb, "
            "or leave the field empty"
        ) from error
    return wandb.init(project=config.wandb, config=to_dict(config), resume="allow")


def correlations(rows: list[dict[str, float]], pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Pearson correlation over a run of each pair of values, from the rows that have
    both; pairs with fewer than three such rows are left out.
    """
    found = {}
    for a, b in pairs:
        both = [(row[a], row[b]) for row in rows if a in row and b in row]
        if len(both) >= 3:
            found[f"{a} ~ {b}"] = float(np.corrcoef(np.array(both).T)[0, 1])
    return found


def read_rows(path: str | Path) -> list[dict[str, float]]:
    """Rows of a log.jsonl, oldest first; what is no row is left out, with a warning.

    Raises:
        LogError: the file cannot be read.
    """
    try:
        os.stat(path)
        rows = [_row(line) for line in _lines(Path(path))]
    except OSError as error:
        raise LogError(
            f"{path}: cannot be read ({error.strerror or error}); give a run that has a log"
        ) from error
    if None in rows:
        warnings.warn(
            f"{path}:{rows.index(None) + 1}: not a row of a log; {rows.count(None)} such lines are left out",
            stacklevel=2,
        )
    return [row for row in rows if row is not None]


def write_summary(output: str, iteration: int, correlated: Sequence[tuple[str, str]]) -> None:
    """OUTPUT/summary.json: means over the last tenth of the run, and the correlations the method asks for."""
    with _named_failure(Path(output) / "summary.json"):
        write_atomically(
            Path(output) / "summary.json",
            json.dumps(_summary(read_rows(Path(output) / "log.jsonl"), iteration, correlated), indent=1),
        )


def _summary(rows: list[dict[str, float]], iteration: int, correlated: Sequence[tuple[str, str]]) -> dict:
    last = rows[-max(1, len(rows) // 10) :]
    means = (
        {
            name: sum(row[name] for row in last if name in row) / sum(name in row for row in last)
            for name in last[-1]
        }
        if last
        else {}
    )
    return {"iteration": iteration, "last_tenth": means, "correlation": correlations(rows, correlated)}


class Means:
    """Mean of each value over the rows added."""

    def __init__(self):
        self._totals: dict[str, list[float]] = {}  # sum and count

    def add(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            total = self._totals.setdefault(name, [0.0, 0])
            total[0], total[1] = total[0] + value, total[1] + 1

    def taken(self) -> dict[str, float]:
        """The means, which begin anew."""
        totals, self._totals = self._totals, {}
        return {name: total / count for name, (total, count) in totals.items()}


class IterationValues:
    """What this rank knows of the values of some iterations, until they are joined."""

    def __init__(self, iterations: int):
        # Sums over data x context ranks and over stages
        self._contributions: list[dict[str, Tensor]] = [{} for _ in range(iterations)]
        # Of gradients, to be summed over stages
        self._squares: list[dict[str, float]] = [{} for _ in range(iterations)]
        self._rates: list[dict[str, float]] = [{} for _ in range(iterations)]

    def add(self, iteration: int, metrics: Mapping[str, Tensor]) -> None:
        present = self._contributions[iteration]
        for name, value in metrics.items():
            present[name] = present.get(name, 0.0) + value

    def updated(self, iteration: int, role: str, square: float, lr: float) -> None:
        self._squares[iteration][role] = square
        self._rates[iteration][role] = lr

    def joined(self, mesh: Mesh) -> list[dict[str, float]]:
        """The values of each iteration, the same on every rank."""
        mine = [
            (_summed(contributions, mesh), squares)
            for contributions, squares in zip(self._contributions, self._squares, strict=True)
        ]
        everyone = [mine]
        if mesh.pp.size > 1:
            everyone = [None] * mesh.pp.size
            dist.all_gather_object(everyone, mine, group=mesh.pp.group)
        rows = []
        for parts, rates in zip(zip(*everyone, strict=True), self._rates, strict=True):
            row, squares = defaultdict(float), defaultdict(float)
            for values, own in parts:
                for name, value in values.items():
                    row[name] += value
                for role, square in own.items():
                    squares[role] += square
            norms = {f"{role}/grad_norm": math.sqrt(square) for role, square in squares.items()}
            rows.append({**row, **norms, **{f"{role}/lr": lr for role, lr in rates.items()}})
        return rows


def _summed(contributions: Mapping[str, Tensor], mesh: Mesh) -> dict[str, float]:
    """Adds up the contributions of every rank of this stage with one call."""
    if not contributions:
        return {}
    # Data-parallel ranks of a pipeline may run their branches in different orders
    names = sorted(contributions)
    values = torch.stack([contributions[name].detach().double() for name in names])
    if mesh.dp_cp.size > 1:
        dist.all_reduce(values, group=mesh.dp_cp.group)
    return dict(zip(names, values.tolist(), strict=True))
