"""python -m megatron_apt.kernels.bench: time and bandwidth of every kernel on a GPU;
--compile-only: what each takes on a Hopper chip, without one.

Needs torch and Triton only. The shapes are in cases.py.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_apt.kernels.cases import Case, cases, launches, leaves_of, smooth_outputs
from megatron_apt.kernels.launch import triton


def compile_all(capability: int) -> list[dict]:
    from megatron_apt.kernels.compile import compiled, distinct

    return [
        resources.row() | {"problems": resources.problems()}
        for resources in (compiled(one, capability) for one in distinct(launches()))
    ]


def resource_table(rows: list[dict]) -> str:
    lines = [
        "| kernel | types | registers | spilled B | shared B | warps | blocks per SM | matrix |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        columns = ("kernel", "types", "registers", "spilled", "shared", "warps", "blocks", "matrix")
        lines.append("| " + " | ".join(str(r[column]) for column in columns) + " |")
    return "\n".join(lines)


def _milliseconds(function: Callable[[], object]) -> tuple[float, bool]:
    """Median time of a call that finds nothing in L2, and whether of a CUDA graph: Python
    takes longer to launch a short kernel than it runs.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
            with torch.cuda.graph(graph, stream=stream):
                function()
        call = graph.replay
    except Exception:  # something in it cannot be captured, or it fails, and will say so below
        call = function
    return triton.testing.do_bench(call, warmup=25, rep=100, return_mode="median"), call is not function


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy of 2 GiB reads and writes."""
    source = torch.empty(2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (_milliseconds(lambda: target.copy_(source))[0] * 1e-3)


def _timed(case: Case, call: Callable, device: torch.device) -> tuple[float, float, bool]:
    """Milliseconds of a forward pass alone and of both, and whether both were CUDA graphs."""
    leaves = leaves_of(case, device)
    with torch.no_grad():
        forward, captured = _milliseconds(lambda: call(*leaves))
    if not case.backward:
        return forward, forward, captured
    weights = [torch.randn_like(o) for o in smooth_outputs(call, leaves)]
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    both, both_captured = _milliseconds(
        lambda: torch.autograd.grad(smooth_outputs(call, leaves), inputs, weights, allow_unused=True)
    )
    return forward, both, captured and both_captured


def _figures(case: Case, call: Callable, device: torch.device, bandwidth: float) -> dict:
    """A contender's, or its error, which must not cost the others theirs."""
    try:
        forward, both, captured = _timed(case, call, device)
        torch.cuda.empty_cache()
    except Exception as error:
        return {"error": one_line(error)}
    moved = case.moved[0] + (case.moved[1] if case.backward else 0.0)
    return {
        "forward_ms": forward,
        "both_ms": both,
        "gb_per_s": moved / both / 1e6,
        "of_copy": moved / (both * 1e-3) / bandwidth,
        "forward_of_copy": case.moved[0] / (forward * 1e-3) / bandwidth,
        "tflop_per_s": sum(case.flops) / both / 1e9,
        "graph": captured,
    }


def one_line(error: Exception, length: int = 200) -> str:
    """For a cell of a table."""
    return " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")[:length]


def measure(
    dtype: torch.dtype, device: torch.device, only: str = "", seconds: float = math.inf
) -> Iterator[dict]:
    """Times of each case by our kernels, torch as written and a library's own; then,
    while less than `seconds` have passed, by torch.compile.
    """
    begin, bandwidth = time.monotonic(), copy_bandwidth(device)
    yield {"kernel": "copy", "dtype": "uint8", "by": "torch", "gb_per_s": bandwidth / 1e9, "of_copy": 1.0}
    chosen = [
        (case, {"kernel": case.name, "dtype": str(dtype).removeprefix("torch.")})
        for case in cases(dtype)
        if only in case.name
    ]
    for case, head in chosen:
        for name, call in (("ours", case.ours), ("eager", case.eager), case.rival or ("", None)):
            if call is not None:
                yield head | {"by": name} | _figures(case, call, device, bandwidth)
    for case, head in chosen:
        if case.eager is None:
            continue
        if time.monotonic() - begin > seconds:
            yield head | {"by": "compiled", "skipped": "out of time"}
            continue
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        figures = _figures(case, torch.compile(case.eager, dynamic=False), device, bandwidth)
        yield (
            head
            | {"by": "compiled"}
            | figures
            | {"graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values())}
        )


TIME_HEAD = """| kernel | dtype | by | forward ms | forward + backward ms | GB/s | of copy bandwidth | |
|---|---|---|---|---|---|---|---|"""


def time_line(row: dict) -> str:
    """One row of the table."""
    figures = [
        f"{row[key]:.{digits}f}" if key in row else ""
        for key, digits in (("forward_ms", 3), ("both_ms", 3), ("gb_per_s", 0), ("of_copy", 2))
    ]
    notes = [
        f"{'failed' if key == 'error' else key}: {row[key]}" for key in ("error", "skipped") if key in row
    ]
    notes += ["not a CUDA graph"] if not row.get("graph", True) else []
    notes += [f"{row['graph_breaks']} graph breaks"] if row.get("graph_breaks") else []
    return "| " + " | ".join([row["kernel"], row["dtype"], row["by"], *figures, ", ".join(notes)]) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_apt.kernels.bench", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="compile every kernel for a chip and print its resources; needs no GPU",
    )
    parser.add_argument(
        "--capability", type=int, default=90, help="the chip to compile for: 90 is Hopper, 100 Blackwell"
    )
    parser.add_argument("--only", default="", help="measure kernels whose name contains this")
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="after these, begin no more comparisons with torch.compile",
    )
    parser.add_argument(
        "--json", default="", metavar="FILE", help="also write the figures to this file, as they come"
    )
    options = parser.parse_args()

    def write(rows: list[dict]) -> None:
        if options.json:
            Path(options.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")

    if triton is None:
        print(
            "Triton is not installed here (it needs Linux): no kernel can be compiled or run; models take "
            "the references in torch."
        )
        return 0
    if options.compile_only:
        found = compile_all(options.capability)
        print(resource_table(found))
        problems = [problem for row in found for problem in row["problems"]]
        print(
            "\n".join(problems)
            or f"{len(found)} kernels compile for sm_{options.capability}: nothing spills, shared memory "
            "suffices."
        )
    elif not torch.cuda.is_available():
        print("No CUDA GPU here: nothing is measured. --compile-only compiles every kernel for one.")
        return 0
    else:
        device = torch.device("cuda")
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton.__version__}")
        print(f"\n{TIME_HEAD}")
        found = []
        for row in measure(torch.bfloat16, device, options.only, options.seconds):
            found.append(row)
            print(time_line(row), flush=True)
            write(found)
        problems = [row for row in found if row["by"] == "ours" and "error" in row]
    write(found)
    return 1 if problems else 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
