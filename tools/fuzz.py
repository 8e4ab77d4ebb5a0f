"""Damaged and hostile inputs for every boundary: each must work, be refused by name, or
be skipped and listed.

    python tools/fuzz.py --inputs 1000 [--seed 0] [--boundary videos,pictures] [--json
    FILE] [--keep DIR] [--toy]
    python tools/fuzz.py --only videos:17          one input again

Inputs are made from the seed and their number alone. An input that crashes the program,
ends it with an error that names nothing, hangs over 30 s, takes over 2 GiB or gets its
code run is a fault; exit code 1 if there is any. --keep copies the inputs of faults.
"""

import argparse
import json
import os
import queue
import shutil
import sys
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path

from fuzzing import BOUNDARIES
from fuzzing.worker import Result, Worker

TOY = 60  # inputs


def shares(inputs: int, names: list[str]) -> dict[str, int]:
    """So many inputs dealt out over boundaries, each at least one."""
    total = sum(BOUNDARIES[name].share for name in names)
    return {name: max(1, round(inputs * BOUNDARIES[name].share / total)) for name in names}


def campaign(
    counts: dict[str, int], root: Path, seed: int, limit: float, jobs: int, keep: Path | None, first: int = 0
) -> list[Result]:
    """Every boundary's inputs, `jobs` boundaries at a time."""
    todo: queue.SimpleQueue = queue.SimpleQueue()
    for name in sorted(counts, key=lambda name: -counts[name]):
        todo.put(name)
    results: list[Result] = []

    def work(job: int) -> None:
        worker = Worker(root, seed, limit, str(job))
        try:
            while True:
                name = todo.get_nowait()
                for number in range(first, first + counts[name]):
                    result = worker.run(name, number)
                    results.append(result)
                    _finish(result, worker.scratch / f"{name}-{number}", keep)
        except queue.Empty:
            pass
        finally:
            worker.stop()

    threads = [threading.Thread(target=work, args=(job,)) for job in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _finish(result: Result, folder: Path, keep: Path | None) -> None:
    if not result.good:
        print(
            f"{result.boundary}:{result.number} {result.kind}: {result.what}\n    {result.message}",
            file=sys.stderr,
            flush=True,
        )
        if keep is not None and folder.exists():
            shutil.copytree(folder, keep / folder.name, dirs_exist_ok=True, symlinks=True, ignore=_special)
    shutil.rmtree(folder, ignore_errors=True)


def _special(folder: str, names: list[str]) -> list[str]:
    """What cannot be copied: pipes and devices."""
    return [
        name
        for name in names
        if not (os.path.isfile(path := os.path.join(folder, name)) or os.path.isdir(path))
    ]


def table(results: list[Result]) -> str:
    lines = [
        f"{'boundary':12} {'inputs':>6} {'fine':>6} {'named':>6} {'skipped':>7} {'faults':>6} "
        f"{'slowest s':>9} {'peak MiB':>8}"
    ]
    for name in [*dict.fromkeys(result.boundary for result in results), ""]:
        rows = [result for result in results if name in ("", result.boundary)]
        good = [sum(row.kind == kind for row in rows) for kind in ("fine", "named", "skipped")]
        faults, slowest, peak = (
            len(rows) - sum(good),
            max(row.seconds for row in rows),
            max(row.peak_mib for row in rows),
        )
        lines.append(
            f"{name or 'all':12} {len(rows):6} {good[0]:6} {good[1]:6} {good[2]:7} {faults:6} {slowest:9.1f} "
            f"{peak:8}"
        )
    return "\n".join(lines)


def boundaries(text: str) -> list[str]:
    """Of --boundary."""
    names = text.split(",")
    if unknown := [name for name in names if name not in BOUNDARIES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; use some of {', '.join(BOUNDARIES)}")
    return names


def one_input(text: str) -> tuple[str, int]:
    """Of --only."""
    name, _, number = text.partition(":")
    if name not in BOUNDARIES or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no input; give BOUNDARY:NUMBER, for example videos:17")
    return name, int(number)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--boundary", type=boundaries, default=list(BOUNDARIES), help=f"some of {', '.join(BOUNDARIES)}"
    )
    parser.add_argument("--only", type=one_input, help="BOUNDARY:NUMBER, one input")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for one input")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--toy", action="store_true", help=f"{TOY} inputs")
    parser.add_argument("--json", default="")
    parser.add_argument("--keep", type=Path, help="folder for the inputs of faults")
    options = parser.parse_args()
    counts, first = shares(TOY if options.toy else options.inputs, options.boundary), 0
    if options.only:
        name, first = options.only
        counts = {name: 1}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        results = campaign(
            counts,
            Path(root),
            options.seed,
            options.limit,
            min(options.jobs, len(counts)),
            options.keep,
            first,
        )
    results.sort(key=lambda result: (list(BOUNDARIES).index(result.boundary), result.number))
    if options.only:
        print("\n".join(f"{name}: {value}" for name, value in asdict(results[0]).items()))
    print(table(results))
    if options.json:
        Path(options.json).write_text(
            json.dumps([asdict(result) for result in results], indent=1), encoding="utf-8"
        )
    return int(not all(result.good for result in results))


if __name__ == "__main__":
    sys.exit(main())
