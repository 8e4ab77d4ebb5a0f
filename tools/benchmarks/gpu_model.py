"""One block and the whole of the 8B model at 46,800 visual tokens (1280x720, 2 s) on one
GPU, in BF16 and FP8, beside diffusers' block with SDPA.

    python tools/benchmarks/gpu_model.py --json FILE [--calibration FILE] [--seconds S]
    python tools/benchmarks/gpu_model.py --device cpu --toy     the same code on a small model, which
                                                                tells nothing but that it runs

MFU counts matrix products and attention of a forward pass once and of a backward pass
twice, over the chip's dense BF16 peak, for FP8 too. The calibration file holds a block's
forward, input-gradient and weight-gradient seconds, which `megatron-apt schedule`,
`megatron-apt plan` and `--pipeline.calibration` read. Both files are written again after
every figure; the exit code is 1 if the bf16 block or the bf16 model lacks one.
"""

import argparse
import gc
import itertools
import json
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megatron_apt  # noqa: F401  (must stand before any import of megatron.core)
from megatron_apt import scripts
from megatron_apt.config import ParallelConfig
from megatron_apt.families.mmdit.config import seaweed_8b
from megatron_apt.families.mmdit.model import MMDiT
from megatron_apt.kernels.bench import one_line
from megatron_apt.kernels.launch import implementation
from megatron_apt.models.condition import Condition
from megatron_apt.models.config import Fp8Config, ModelConfig, Recipe
from megatron_apt.models.embeddings import rotary_table
from megatron_apt.models.layout import Layout, build_layout
from megatron_apt.models.parameters import declared
from megatron_apt.models.stages import Cut
from megatron_apt.parallel import deferred
from megatron_apt.parallel.mesh import Axis, Mesh
from megatron_apt.parallel.startup import start


@dataclass(frozen=True)
class Tokens:
    """Of one sample."""

    grid: tuple[int, int, int]
    text: int

    @property
    def visual(self) -> int:
        return math.prod(self.grid)


# 49 frames of 720 x 1280 through a codec of 4 x 8 x 8 and patches of 1 x 2 x 2: 46,800
# tokens
VIDEO = Tokens((13, 45, 80), 256)
TOY = Tokens((2, 3, 5), 7)
# Dense BF16
PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "A100": 312e12,
}


class Clock:
    """Moments of a device's work, not of the host that queues it."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, marks: Sequence[Any]) -> list[float]:
        """Seconds from each to the next."""
        if not self.cuda:
            return [b - a for a, b in itertools.pairwise(marks)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(marks)]

    def seconds(self, function: Callable[[], object], repeats: int = 5, warm: int = 2) -> float:
        """Median time of a call."""
        times = []
        for _ in range(warm + repeats):
            begin = self.mark()
            function()
            times += self.between((begin, self.mark()))
        return sorted(times[warm:])[repeats // 2]

    def free(self) -> None:
        """Gives back what is held, and begins a new peak."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@torch.no_grad()
def build(model: ModelConfig, mesh: Mesh, **parts) -> MMDiT:
    """A network with random weights: their values do not matter for time, finite ones do."""
    network = MMDiT(model, mesh, **parts).to(mesh.device)
    for p in network.parameters():
        p.normal_(std=0.02)
    return network


def buffers(network: torch.nn.Module) -> None:
    """The fp32 gradients that training has, into which the weight gradients' products add."""
    for p in network.parameters():
        declared(p).main_grad = torch.zeros_like(p, dtype=torch.float32)


class BlockProblem:
    """Block 1 of three, which FP8 takes, and its inputs."""

    def __init__(self, model: ModelConfig, tokens: Tokens, mesh: Mesh):
        self.clock = Clock(mesh.device)
        self.model = replace(model, depth=3, recompute="none")
        self.network = build(self.model, mesh, output=False, cut=Cut())
        buffers(self.network)
        layout = build_layout((tokens.grid,), (tokens.text,), mesh)
        make = lambda *shape: torch.randn(*shape, device=mesh.device, dtype=torch.bfloat16)  # noqa: E731
        d = model.width
        visual, text = layout.visual.fold(make(tokens.visual, d)), layout.text.fold(make(tokens.text, d))
        self.inputs = [visual, text, make(1, d), make(1, 6 * d)]
        self.rest = (layout, rotary_table(layout, model.rotary_pairs, model.rope_theta, torch.bfloat16))
        self.gradients = [torch.randn_like(t) for t in self.inputs[:2]]

    def forward(self) -> tuple[Tensor, Tensor]:
        visual, text = self.network._run(1, tuple(self.inputs), *self.rest)
        return visual, text

    def both(self) -> None:
        for t in self.inputs:
            t.requires_grad_(True)
        torch.autograd.backward(self.forward(), self.gradients)
        self.clear()

    def clear(self) -> None:
        for t in (*self.inputs, *self.network.parameters()):
            t.grad = None

    def split(self) -> dict[str, float]:
        """Seconds of F, I and W apart."""
        store, made = deferred.WeightGradients(), []

        def forward() -> None:
            made[:] = self.forward()

        def parts() -> list[float]:
            marks = [self.clock.mark()]
            with deferred.deferring(store):
                forward()
                marks.append(self.clock.mark())
                torch.autograd.backward(made, self.gradients)
            marks.append(self.clock.mark())
            store.run()
            marks.append(self.clock.mark())
            self.clear()
            return self.clock.between(marks)

        runs = [parts() for _ in range(7)][2:]
        return dict(
            zip("FIW", (sorted(values)[len(values) // 2] for values in zip(*runs, strict=True)), strict=True)
        )


Figures = Iterator[dict[str, float]]  # a few at a time, so that what fails later costs none of them


def measure_block(model: ModelConfig, tokens: Tokens, mesh: Mesh, peak: float) -> Figures:
    flops, clock = model.block_flops(tokens.visual, tokens.text), Clock(mesh.device)
    problem = BlockProblem(model, tokens, mesh)
    with torch.no_grad():
        forward = clock.seconds(problem.forward)
    yield {"forward_s": forward, "forward_mfu": flops / forward / peak, "tflop": flops / 1e12}
    clock.free()
    both = clock.seconds(problem.both)
    yield {"both_s": both, "train_mfu": 3 * flops / both / peak, "peak_gib": clock.peak_gib()}
    # Transformer Engine puts weight gradients off only in layers that were built for a pipeline.
    staged = BlockProblem(model, tokens, replace(mesh, pp=Axis(2, 0, mesh.pp.group)))
    for t in staged.inputs:
        t.requires_grad_(True)
    yield staged.split()


def measure_diffusers(model: ModelConfig, tokens: Tokens, device: torch.device, peak: float) -> Figures:
    """diffusers' SD3 block, which has the same matrix products (no rotation), as its
    users run it: SDPA, and on a GPU torch.compile.
    """
    from diffusers.models.attention import JointTransformerBlock

    flops, clock = model.block_flops(tokens.visual, tokens.text), Clock(device)
    block = JointTransformerBlock(model.width, model.heads, model.head_size, qk_norm="rms_norm").to(
        device, torch.bfloat16
    )
    make = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)  # noqa: E731
    x, text, c = (
        make(1, tokens.visual, model.width),
        make(1, tokens.text, model.width),
        make(1, model.width),
    )
    gradients = [torch.randn_like(t) for t in (text, x)]
    calls = {"": block} | ({"compiled_": torch.compile(block)} if clock.cuda else {})
    for name, call in calls.items():
        run = lambda call=call: call(hidden_states=x, encoder_hidden_states=text, temb=c)  # noqa: E731

        def both(run=run) -> None:
            torch.autograd.backward(run(), gradients)
            for t in (x, text, *block.parameters()):
                t.grad = None

        for t in (x, text):
            t.requires_grad_(False)
        with torch.no_grad():
            yield {f"{name}forward_s": clock.seconds(run)}
        for t in (x, text):
            t.requires_grad_(True)
        trained = clock.seconds(both)
        yield {f"{name}both_s": trained, f"{name}train_mfu": 3 * flops / trained / peak}


def measure_model(model: ModelConfig, tokens: Tokens, mesh: Mesh, peak: float) -> Figures:
    """The whole network on one sample: one step of the generator (no gradient), and a
    forward and backward pass with recomputation.
    """
    network, clock = build(model, mesh), Clock(mesh.device)
    layout: Layout = build_layout((tokens.grid,), (tokens.text,), mesh)
    x = torch.randn(len(layout.positions), model.patch_width, device=mesh.device, dtype=torch.bfloat16)
    text = torch.randn(tokens.text, model.text_width, device=mesh.device, dtype=torch.bfloat16)
    condition, t = (
        Condition(text, (tokens.text,), text.mean(0, keepdim=True)),
        torch.ones(1, device=mesh.device),
    )
    flops = model.depth * model.block_flops(len(x), tokens.text)
    with torch.no_grad():
        forward = clock.seconds(lambda: network(x, t, condition, layout), repeats=2, warm=1)
    yield {
        "weights": sum(p.numel() for p in network.parameters()),
        "forward_s": forward,
        "forward_mfu": flops / forward / peak,
        "forward_peak_gib": clock.peak_gib(),
    }
    clock.free()
    buffers(network)

    def both() -> None:
        network(x, t, condition, layout).float().square().mean().backward()
        for p in network.parameters():
            p.grad = None

    trained = clock.seconds(both, repeats=1, warm=1)
    # What is computed again does not count.
    yield {"both_s": trained, "train_mfu": 3 * flops / trained / peak, "peak_gib": clock.peak_gib()}


def fp8_recipes(device: torch.device) -> list[Recipe]:
    """Recipes this machine can run, with the reason on the screen where there is none."""
    from megatron_apt.models.fp8 import require

    able: list[Recipe] = []
    recipes: tuple[Recipe, ...] = ("current", "delayed", "blockwise", "mxfp8")
    for recipe in recipes:
        try:
            require(Fp8Config(recipe), device)
            able.append(recipe)
        except Exception as error:
            print(f"FP8 {recipe} not measured: {one_line(error)}", flush=True)
    return able


HEAD = (
    "| what | forward s | forward + backward s | train MFU | peak GiB | F/I/W s | "
    "|\n|---|---|---|---|---|---|---|"
)


def row(name: str, found: dict) -> str:
    cell = lambda key, digits: f"{found[key]:.{digits}f}" if key in found else ""  # noqa: E731
    cells = [cell("forward_s", 4), cell("both_s", 4), cell("train_mfu", 3), cell("peak_gib", 1)]
    cells.append("/".join(cell(key, 4) for key in "FIW") if "F" in found else "")
    cells.append(
        f"failed: {found['error']}"
        if "error" in found
        else f"skipped: {found['skipped']}"
        if "skipped" in found
        else ""
    )
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", default="", type=scripts.output_file)
    parser.add_argument("--calibration", metavar="FILE", default="", type=scripts.output_file)
    parser.add_argument("--depth", type=scripts.whole(1), default=36, help="blocks of the whole model")
    parser.add_argument("--no-model", action="store_true", help="measure a block only")
    parser.add_argument(
        "--seconds",
        type=scripts.number(0, math.inf),
        default=math.inf,
        help="after these, begin no other measurement",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="a small model and a short clip")
    options, begin = parser.parse_args(), time.monotonic()
    if torch.cuda.is_available() != (options.device == "cuda"):
        print(
            "No CUDA GPU here: nothing is measured."
            if options.device == "cuda"
            else "--device cpu: this machine has a GPU; hide it with CUDA_VISIBLE_DEVICES="
        )
        return 0 if options.device == "cuda" else 2
    mesh = start(ParallelConfig(row_multiple=16))
    name = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "CPU"
    peak = next((value for key, value in PEAKS.items() if key in name), 989e12)
    model, tokens = (
        (replace(seaweed_8b(), depth=4, width=128, heads=4, text_width=32), TOY)
        if options.toy
        else (replace(seaweed_8b(), depth=options.depth), VIDEO)
    )
    eights = {f"fp8 {recipe}": replace(model, fp8=Fp8Config(recipe)) for recipe in fp8_recipes(mesh.device)}
    clock = Clock(mesh.device)
    found: dict[str, dict] = {}

    def write() -> None:
        shape = {"device": name, "visual_tokens": tokens.visual, "text_tokens": tokens.text}
        if options.json:
            result = shape | {"torch": torch.__version__, "peak_flops": peak, "figures": found}
            Path(options.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
        blocks = {
            key.removeprefix("block "): {kind: value[kind] for kind in "FIW"}
            for key, value in found.items()
            if "F" in value
        }
        if options.calibration and blocks:
            result = shape | {"width": model.width, "mlp_ratio": model.mlp_ratio, "blocks": blocks}
            Path(options.calibration).write_text(json.dumps(result, indent=1), encoding="utf-8")

    def attempt(key: str, measure: Callable[[], Figures]) -> None:
        found[key] = {}
        if time.monotonic() - begin > options.seconds:
            found[key]["skipped"] = "out of time"
        else:
            clock.free()
            try:
                for figures in measure():
                    found[key] |= figures
                    write()
            except Exception as error:  # one figure that fails must not cost the others
                found[key]["error"] = one_line(error, 300)
        print(row(key, found[key]), flush=True)
        write()

    print(
        f"{name}, torch {torch.__version__}, {tokens.visual:,} visual and {tokens.text} text tokens, peak "
        f"taken as {peak / 1e12:.0f} TFLOP/s\n\n{HEAD}"
    )
    block = lambda variant: lambda: measure_block(variant, tokens, mesh, peak)  # noqa: E731
    whole = lambda variant: lambda: measure_model(variant, tokens, mesh, peak)  # noqa: E731
    attempt("block bf16", block(model))
    if not options.no_model:
        attempt("model bf16", whole(model))
    with implementation("reference"):
        attempt("block bf16 without own kernels", block(model))
    for key, variant in eights.items():
        attempt(f"block {key}", block(variant))
    able = [key for key in eights if "both_s" in found[f"block {key}"]]
    if able and not options.no_model:
        best = min(able, key=lambda key: found[f"block {key}"]["both_s"])
        attempt(f"model {best}", whole(eights[best]))
    attempt("block bf16 diffusers", lambda: measure_diffusers(model, tokens, mesh.device, peak))
    alone = model.depth * found["block bf16"].get("forward_s", math.nan)
    print(
        f"\nA step of the generator is one forward pass of the model. Its {model.depth} blocks by "
        f"themselves: {alone:.3f} s in bf16."
    )
    wanted = ["block bf16"] if options.no_model else ["block bf16", "model bf16"]
    return 1 if any("both_s" not in found[key] or "error" in found[key] for key in wanted) else 0


if __name__ == "__main__":
    scripts.run(main)
