"""Compares two runs: every logged value, and every tensor of their latest checkpoints
(weights, average, optimiser states).

    python tools/compare_runs.py RUN_A RUN_B [--rtol 0] [--json FILE]

Exit code 0 if nothing differs by more than --rtol (0: bit for bit), 1 otherwise. A tensor
may be off by rtol of its own largest entry. Where one of them has no log (a resharded
checkpoint, an iteration-* folder), only tensors are compared, and that is said.
"""

import argparse
import json
import math
from pathlib import Path

import torch

import megatron_apt  # noqa: F401  (must stand before any import of megatron.core)
from megatron_apt import scripts
from megatron_apt.checkpoint import store
from megatron_apt.training.log import read_rows

TIMES = {"seconds"}  # differ between equal runs


def difference(a: float | None, b: float | None) -> float:
    """Relative difference; two NaN, or two equal infinities, are the same."""
    if a is None or b is None:
        return math.inf
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    error = abs(a - b) / max(abs(a), abs(b), 1e-30)
    return math.inf if math.isnan(error) else error


def tensor_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry of a; infinite where only one is
    finite or they are different infinities.
    """
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    error = (a - b)[~same].abs()
    return (
        math.inf
        if not bool(error.isfinite().all())
        else float(error.max() / a[a.isfinite()].abs().max().clamp(min=1e-30))
    )


def compare_logs(a: Path, b: Path, rtol: float) -> dict:
    """First difference between two log.jsonl, if any, and the largest relative one."""
    if missing := [str(run) for run in (a, b) if not (run / "log.jsonl").is_file()]:
        return {"rows": 0, "first_difference": "", "largest_relative_difference": 0.0, "missing": missing}
    rows_a, rows_b = read_rows(a / "log.jsonl"), read_rows(b / "log.jsonl")
    first, largest = "", 0.0
    if len(rows_a) != len(rows_b):
        first = f"{len(rows_a)} rows and {len(rows_b)} rows"
    for x, y in zip(rows_a, rows_b, strict=False):
        for name in sorted((x.keys() | y.keys()) - TIMES):
            error = difference(x.get(name), y.get(name))
            largest = max(largest, error)
            if error > rtol and not first:
                first = f"iteration {x['iteration']}: {name} is {x.get(name)} and {y.get(name)}"
    return {"rows": len(rows_a), "first_difference": first, "largest_relative_difference": largest}


def compare_tensors(a: Path, b: Path, rtol: float) -> dict:
    """First tensor that differs, if any, and the largest difference relative to a tensor's largest entry."""
    first, largest, count = "", 0.0, 0
    names_a, names_b = set(store.index(a)), set(store.index(b))
    if names_a != names_b:
        first = f"tensors of one only: {sorted(names_a ^ names_b)[:3]}"
    for (key, x), (other, y) in zip(store.read_tensors(a), store.read_tensors(b), strict=False):
        if key != other or x.shape != y.shape:
            first = first or f"{key} {tuple(x.shape)} and {other} {tuple(y.shape)}"
            break
        count += 1
        error = tensor_difference(x, y)
        largest = max(largest, error)
        if error > rtol and not first:
            first = f"{key} is off by {error:.3e} of its largest entry"
    return {"tensors": count, "first_difference": first, "largest_relative_difference": largest}


def compare(a: str, b: str, rtol: float = 0.0) -> dict:
    """Both comparisons, the checkpoints' names, and `equal`."""
    folders = [store.resolve(path) for path in (a, b)]
    states = [store.read_state(folder) for folder in folders]
    result = {
        "checkpoints": [str(folder) for folder in folders],
        "iterations": [state["iteration"] for state in states],
        "log": compare_logs(Path(a), Path(b), rtol),
        "tensors": compare_tensors(*folders, rtol),
    }
    same_place = (
        states[0]["iteration"] == states[1]["iteration"] and states[0]["updates"] == states[1]["updates"]
    )
    result["equal"] = (
        same_place and not result["log"]["first_difference"] and not result["tensors"]["first_difference"]
    )
    return result


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("a")
    arguments.add_argument("b")
    arguments.add_argument("--rtol", type=scripts.number(0), default=0.0)
    arguments.add_argument("--json", metavar="FILE", default="", type=scripts.output_file)
    options = arguments.parse_args()
    result = compare(options.a, options.b, options.rtol)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"iterations  {result['iterations'][0]} and {result['iterations'][1]}")
    for part, count in (("log", "rows"), ("tensors", "tensors")):
        found = result[part]
        if found.get("missing"):
            print(f"{part:11} not compared: none in {' and '.join(found['missing'])}")
            continue
        print(
            f"{part:11} {found[count]} {count}; largest relative difference "
            f"{found['largest_relative_difference']:.3e}"
        )
        if found["first_difference"]:
            print(f"            first: {found['first_difference']}")
    print("equal" if result["equal"] else "DIFFERENT", f"(rtol {options.rtol:g})")
    return int(not result["equal"])


if __name__ == "__main__":
    scripts.run(main)
