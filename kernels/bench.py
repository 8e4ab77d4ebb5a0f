"""python -m megatron_apt.kernels.bench: time and bandwidth of every kernel on a GPU; --compile-only: what each takes on a Hopper chip, without one.

Needs torch and Triton only. Shapes are those of the 8B model at 1280x720, 2 s: 46,800 visual tokens of width 3,072 in 24 heads of 128.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_apt.kernels.gated_residual import gated_residual, gated_residual_reference
from megatron_apt.kernels.keyed_noise import Tokens, keyed_normal, keyed_normal_reference, keyed_uniform, token_mix
from megatron_apt.kernels.launch import Launch, recording, triton
from megatron_apt.kernels.learnable_query_attention import learnable_query_attention, learnable_query_attention_reference
from megatron_apt.kernels.learnable_query_pooling import learnable_query_pooling, learnable_query_pooling_reference
from megatron_apt.kernels.modulated_norm import modulated_norm, modulated_norm_reference
from megatron_apt.kernels.projected_scores import projected_query_pooling, projected_query_pooling_reference
from megatron_apt.kernels.qk_norm_rope import joint_qkv, joint_qkv_reference
from megatron_apt.kernels.rmsprop_ema import Stretch, Stretches, rmsprop_ema, rmsprop_ema_reference
from megatron_apt.kernels.rows import Rows

TOKENS, WIDTH, HEADS, HEAD_SIZE = 46_800, 3072, 24, 128


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        inputs: makes its tensors on a device; floating-point ones take a gradient where `backward`.
        ours, eager: the same function of them, by kernels and in torch.
        moved: least bytes between chip and memory, forward and backward.
        flops: of matrix products, forward and backward.
        rival: name and call of a library's own, where there is one.
    """

    name: str
    inputs: Callable[[torch.device], list[Tensor]]
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    eager: Callable[..., Tensor | tuple[Tensor, ...]] | None
    moved: tuple[float, float]
    flops: tuple[float, float] = (0.0, 0.0)
    rival: tuple[str, Callable[..., Tensor]] | None = None
    backward: bool = True


def _normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def pointwise(dtype: torch.dtype, tokens: int = TOKENS, samples: int = 1) -> list[Case]:
    size = samples * tokens * WIDTH * dtype.itemsize
    cached: dict[torch.device, Rows] = {}

    def rows(device: torch.device) -> Rows:
        return cached.setdefault(device, Rows.uniform(samples, tokens, device))

    def norm_inputs(device):
        return [_normal(device, dtype, samples, tokens, WIDTH), *(_normal(device, dtype, samples, WIDTH) for _ in range(2))]

    def residual_inputs(device):
        x, h = (_normal(device, dtype, samples, tokens, WIDTH) for _ in range(2))
        return [x, _normal(device, dtype, samples, WIDTH), h]

    norms = [
        Case(
            f"modulated_norm {kind}",
            norm_inputs,
            lambda x, shift, scale, kind=kind: modulated_norm(x, shift, scale, rows(x.device), kind),
            lambda x, shift, scale, kind=kind: modulated_norm_reference(x, shift, scale, rows(x.device), kind),
            (2 * size, 3 * size),
        )
        for kind in ("layer", "rms")
    ]
    residual = Case(
        "gated_residual",
        residual_inputs,
        lambda x, gate, h: gated_residual(x, gate, h, rows(x.device)),
        lambda x, gate, h: gated_residual_reference(x, gate, h, rows(x.device)),
        (3 * size, 3 * size),
    )
    return [*norms, residual]


def joint(dtype: torch.dtype, text: int = 256) -> Case:
    tables: dict[torch.device, Tensor] = {}

    def inputs(device):
        streams = [_normal(device, dtype, 1, length, HEADS, 3, HEAD_SIZE) for length in (text, TOKENS)]
        return [*streams, *(_normal(device, dtype, 2, HEAD_SIZE) for _ in range(2))]

    def table(device) -> Tensor:
        if device not in tables:
            phases = torch.rand(1, TOKENS, 1, 1, HEAD_SIZE // 2, device=device)
            tables[device] = torch.complex(phases.cos(), phases.sin())
        return tables[device]

    size, phases = (TOKENS + text) * WIDTH * dtype.itemsize, 4 * HEAD_SIZE * TOKENS
    return Case(
        "qk_norm_rope",
        inputs,
        lambda *x: joint_qkv(*x, table(x[0].device)),
        lambda *x: joint_qkv_reference(*x, table(x[0].device)),
        (6 * size + phases, 8 * size + phases),
    )


def update(dtype: torch.dtype, weights: int = 2**26) -> Case:
    """Weights of `dtype` with fp32 gradients, masters, state and average."""
    made: list[Stretches] = []  # of the gradient and the parameters of the latest inputs

    def inputs(device):
        master, square, average, grad = (torch.rand(weights, device=device) for _ in range(4))
        parameters = torch.empty(weights, device=device, dtype=dtype)
        made[:] = [Stretches([Stretch(slice(0, weights), grad, parameters, 1.0)])]
        return [master, square, average]

    numbers = (1e-5, 0.9, 1e-8, 0.995)

    def ours(*shard):
        rmsprop_ema(*shard, made[0], *numbers)

    def eager(*shard):
        rmsprop_ema_reference(*shard, made[0], *numbers)

    return Case("rmsprop_ema", inputs, ours, eager, ((28 + dtype.itemsize) * weights, 0.0), backward=False)


def noise(dtype: torch.dtype) -> list[Case]:
    """One video's latents, 16 x 13 x 90 x 160, and the same as 46,800 tokens of 64 numbers, mixed into samples."""
    size, grid = (13, 90, 160), (13, 45, 80)
    count = 16 * size[0] * size[1] * size[2]

    def tokens(device) -> Tokens:
        positions = torch.cartesian_prod(*(torch.arange(n) for n in grid)).to(device)
        return Tokens(positions, torch.zeros(TOKENS, dtype=torch.int64, device=device), torch.tensor([size]).to(device), (1, 2, 2))

    places: dict[torch.device, Tokens] = {}

    def mixed(x, ids, a, b):
        if x.device not in places:
            places[x.device] = tokens(x.device)
        return token_mix(7, ids, places[x.device], x, a, b)

    def drawn_and_mixed(x, ids, a, b):
        z = keyed_normal_reference(7, ids, count, dtype=x.dtype).view(16, 13, 45, 2, 80, 2)
        return a.to(x.dtype) * x + b.to(x.dtype) * z.permute(1, 2, 4, 0, 3, 5).reshape(x.shape)  # to tokens, as patchify does

    def tokens_inputs(device):
        number = lambda value: torch.full((1,), value, device=device)  # noqa: E731
        return [_normal(device, dtype, TOKENS, 64), torch.zeros(1, dtype=torch.int64, device=device), number(0.3), number(0.7)]

    ids = lambda device: [torch.zeros(1, dtype=torch.int64, device=device)]  # noqa: E731
    stream = Case(
        "keyed_normal",
        ids,
        lambda ids: keyed_normal(7, ids, count, dtype=dtype),
        lambda ids: keyed_normal_reference(7, ids, count, dtype=dtype),
        (count * dtype.itemsize, 0.0),
        backward=False,
    )
    uniform = Case("keyed_uniform", ids, lambda ids: keyed_uniform(7, ids, count, dtype=dtype), None, (count * dtype.itemsize, 0.0), backward=False)
    return [stream, uniform, Case("token_mix", tokens_inputs, mixed, drawn_and_mixed, (2 * count * dtype.itemsize, 0.0), backward=False)]


def queries(dtype: torch.dtype, tokens: int = TOKENS) -> list[Case]:
    """The discriminator's heads; the second and third do without a value projection, the third includes that of keys."""
    size, product, heads = tokens * WIDTH * dtype.itemsize, 2.0 * tokens * WIDTH * WIDTH, (HEADS, HEAD_SIZE)
    cached: dict[torch.device, Rows] = {}

    def shapes(*wide: tuple[int, ...]) -> Callable[[torch.device], list[Tensor]]:
        return lambda device: [_normal(device, dtype, *shape) for shape in (heads, *wide, (HEAD_SIZE,))]

    def on_rows(function: Callable) -> Callable:
        return lambda *tensors: function(*tensors, cached.setdefault(tensors[0].device, Rows.uniform(1, tokens, tensors[0].device)))

    def case(name, inputs, ours, eager, moved, flops=(0.0, 0.0)):
        return Case(name, inputs, on_rows(ours), on_rows(eager), moved, flops)

    def sdpa(q, kv, k_scale):
        k, v = (t.transpose(1, 2) for t in kv.unbind(3))
        return F.scaled_dot_product_attention(q[None, :, None], k, v)

    kv, x, pooled = (1, tokens, HEADS, 2, HEAD_SIZE), (1, tokens, WIDTH), 2.0 * tokens * HEADS * WIDTH
    projection = (WIDTH, WIDTH), (WIDTH,)
    return [
        replace(
            case("learnable_query_attention", shapes(kv), learnable_query_attention, learnable_query_attention_reference, (2 * size, 4 * size)),
            rival=("SDPA, keys normalised before", sdpa),
        ),
        case(
            "learnable_query_pooling",
            shapes((1, tokens, *heads), x),
            learnable_query_pooling,
            learnable_query_pooling_reference,
            (2 * size, 4 * size),
            (pooled, 2 * pooled),
        ),
        case(
            "projected_query_pooling",
            shapes(x, *projection),
            projected_query_pooling,
            projected_query_pooling_reference,
            (2 * size, 6 * size),
            (product + pooled, 3 * product + 2 * pooled),
        ),
    ]


def cases(dtype: torch.dtype) -> list[Case]:
    return [*pointwise(dtype), joint(dtype), *queries(dtype), update(dtype), *noise(dtype)]


# --- without a GPU


def launches() -> list[Launch]:
    """Every launch that the cases would make, in bf16 and fp32."""
    found: list[Launch] = []
    for dtype in (torch.bfloat16, torch.float32):
        for case in cases(dtype):
            with recording() as recorded:
                _run(case, case.ours, _leaves(case, torch.device("meta")))
            if not recorded:
                raise AssertionError(f"{case.name} launched nothing")
            found += recorded
    return found


def compile_all(capability: int) -> list[dict]:
    from megatron_apt.kernels.compile import compiled, distinct

    return [resources.row() | {"problems": resources.problems()} for resources in (compiled(one, capability) for one in distinct(launches()))]


def resource_table(rows: list[dict]) -> str:
    lines = ["| kernel | types | registers | spilled B | shared B | warps | blocks per SM | matrix |", "|---|---|---|---|---|---|---|---|"]
    for r in rows:
        columns = ("kernel", "types", "registers", "spilled", "shared", "warps", "blocks", "matrix")
        lines.append("| " + " | ".join(str(r[column]) for column in columns) + " |")
    return "\n".join(lines)


# --- on a GPU


def _leaves(case: Case, device: torch.device) -> list[Tensor]:
    return [t.requires_grad_(case.backward and t.is_floating_point()) for t in case.inputs(device)]


def _smooth(call: Callable, leaves: list[Tensor]) -> list[Tensor]:
    """The outputs that have a gradient."""
    out = call(*leaves)
    return [o for o in ([out] if isinstance(out, Tensor) else out or ()) if o.requires_grad]


def _run(case: Case, call: Callable, leaves: list[Tensor]) -> None:
    smooth = _smooth(call, leaves)
    if case.backward:
        torch.autograd.backward(smooth, [torch.empty_like(o) for o in smooth])


def _milliseconds(function: Callable[[], object]) -> tuple[float, bool]:
    """Median time of a call that finds nothing in L2, and whether of a CUDA graph: Python takes longer to launch a short kernel than it runs."""
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
    leaves = _leaves(case, device)
    with torch.no_grad():
        forward, captured = _milliseconds(lambda: call(*leaves))
    if not case.backward:
        return forward, forward, captured
    weights = [torch.randn_like(o) for o in _smooth(call, leaves)]
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    both, both_captured = _milliseconds(lambda: torch.autograd.grad(_smooth(call, leaves), inputs, weights, allow_unused=True))
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


def measure(dtype: torch.dtype, device: torch.device, only: str = "", seconds: float = math.inf) -> Iterator[dict]:
    """Times of each case by our kernels, torch as written and a library's own; then, while less than `seconds` have passed, by torch.compile."""
    begin, bandwidth = time.monotonic(), copy_bandwidth(device)
    yield {"kernel": "copy", "dtype": "uint8", "by": "torch", "gb_per_s": bandwidth / 1e9, "of_copy": 1.0}
    chosen = [(case, {"kernel": case.name, "dtype": str(dtype).removeprefix("torch.")}) for case in cases(dtype) if only in case.name]
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
        yield head | {"by": "compiled"} | figures | {"graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values())}


TIME_HEAD = """| kernel | dtype | by | forward ms | forward + backward ms | GB/s | of copy bandwidth | |
|---|---|---|---|---|---|---|---|"""


def time_line(row: dict) -> str:
    """One row of the table."""
    figures = [f"{row[key]:.{digits}f}" if key in row else "" for key, digits in (("forward_ms", 3), ("both_ms", 3), ("gb_per_s", 0), ("of_copy", 2))]
    notes = [f"{'failed' if key == 'error' else key}: {row[key]}" for key in ("error", "skipped") if key in row]
    notes += ["not a CUDA graph"] if not row.get("graph", True) else []
    notes += [f"{row['graph_breaks']} graph breaks"] if row.get("graph_breaks") else []
    return "| " + " | ".join([row["kernel"], row["dtype"], row["by"], *figures, ", ".join(notes)]) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_apt.kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--compile-only", action="store_true", help="compile every kernel for a chip and print its resources; needs no GPU")
    parser.add_argument("--capability", type=int, default=90, help="the chip to compile for: 90 is Hopper, 100 Blackwell")
    parser.add_argument("--only", default="", help="measure kernels whose name contains this")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after these, begin no more comparisons with torch.compile")
    parser.add_argument("--json", default="", metavar="FILE", help="also write the figures to this file, as they come")
    options = parser.parse_args()

    def write(rows: list[dict]) -> None:
        if options.json:
            Path(options.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")

    if triton is None:
        print("Triton is not installed here (it needs Linux): no kernel can be compiled or run; models take the references in torch.")
        return 0
    if options.compile_only:
        found = compile_all(options.capability)
        print(resource_table(found))
        problems = [problem for row in found for problem in row["problems"]]
        print("\n".join(problems) or f"{len(found)} kernels compile for sm_{options.capability}: nothing spills, shared memory suffices.")
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
