"""megatron-apt: one console script over the package. Every command prints its options with --help."""

import contextlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_apt import signals
from megatron_apt.config import RunConfig
from megatron_apt.errors import EXPECTED, described
from megatron_apt.once import say_once


def _demo(argv: list[str]) -> None:
    from megatron_apt.launch import relaunch
    from megatron_apt.recipes import DemoConfig

    config = tyro.cli(DemoConfig, args=argv, prog="megatron-apt demo")
    relaunch(config)
    from megatron_apt.demo import run_demo

    run_demo(config)


def _encode(argv: list[str]) -> None:
    from megatron_apt.data.encode import EncodeConfig, encode
    from megatron_apt.guards import INTERRUPTED

    config = tyro.cli(EncodeConfig, args=argv, prog="megatron-apt encode")
    try:
        encode(config)
    except KeyboardInterrupt as interrupted:  # says where to go on
        print(f"megatron-apt: {interrupted}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def load_recipe(spec: str) -> RunConfig:
    """RunConfig of `FILE.py:FUNCTION`.

    Raises:
        ValueError: no such file or function, or one that returns something else.
    """
    file, _, name = spec.partition(":")
    if not Path(file).is_file() or not name:
        raise ValueError(f"recipe {spec!r}: give FILE.py:FUNCTION, for example examples/tiny.py:image")
    module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, str(Path(file).resolve().parent))  # recipes may build on their neighbours, as with plain python
    try:
        module_spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    recipe = getattr(module, name, None)
    if not callable(recipe):
        known = ", ".join(key for key, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__)
        raise ValueError(f"recipe {spec!r}: {file} has no function {name!r}; it has {known}")
    config = recipe()
    if not isinstance(config, RunConfig):
        raise ValueError(f"recipe {spec!r} returned {type(config).__name__}, not a RunConfig")
    return config


def _train(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        raise ValueError("usage: megatron-apt train FILE.py:FUNCTION [--field value ...]; add --help after the recipe for its fields")
    config = tyro.cli(RunConfig, default=load_recipe(argv[0]), args=argv[1:], prog=f"megatron-apt train {argv[0]}")
    from megatron_apt.parallel import startup
    from megatron_apt.progress import training_progress
    from megatron_apt.train import train

    signals.requeue_with(config.guards.requeue_code)
    mesh = startup.start(config.parallel)
    try:
        with training_progress(config, enabled=mesh.is_main) as report:
            train(config, mesh, report)
    finally:
        startup.stop()


@dataclass(frozen=True)
class SampleConfig:
    checkpoint: Annotated[str, tyro.conf.Positional]
    """Run folder or iteration-* folder."""
    prompts: tuple[str, ...] = ()
    """One sample is made of each prompt for each seed; empty: the dataset's first captions."""
    image: str = ""
    """Image-to-video: picture (or video) whose first frame every prompt starts from, covered and cropped to the sample's size; empty: the
    dataset's first captions start from their own first frames. A model with model.wan.first_frame makes samples of one latent frame from text."""
    seeds: tuple[int, ...] = (0,)
    steps: int = 1
    """1: G(z). 2: the zero-shot two-step procedure of APT, for APT checkpoints. N: Euler steps."""
    guidance: float = 1.0
    """Classifier-free guidance scale of the Euler sampler (each step then costs two evaluations)."""
    euler: bool = False
    """Use Euler also for 1 or 2 steps."""
    weights: Literal["ema", "raw"] = "ema"
    negative_prompt: str = ""
    size: tuple[int, int, int] | tuple[()] = ()
    """Latent frames, rows, columns; empty: the size of the dataset's first sample."""
    dataset: str = ""
    """Encoded dataset whose text encoder and codec are used; empty: the one the run was trained on."""
    decode_tiling: int | None = None
    """VAEs: side in pixels of the tiles that are decoded one after the other, which saves memory; 0: whole. None: as the dataset was encoded."""
    format: Literal["png", "gif", "mp4"] = "png"
    fps: float = 8.0
    scale: int = 1
    """Integer enlargement of the pictures."""
    out: str = "samples"


def _sample(argv: list[str]) -> None:
    from megatron_apt.sample import sample_to_files

    sample_to_files(tyro.cli(SampleConfig, args=argv, prog="megatron-apt sample"))


def _report(argv: list[str]) -> None:
    from megatron_apt.demo import rewrite_report
    from megatron_apt.recipes import DemoConfig

    print(rewrite_report(tyro.cli(DemoConfig, args=argv, prog="megatron-apt report")))


def _checkpoint(argv: list[str]) -> None:
    from megatron_apt.checkpoint.commands import Command, run

    sys.exit(run(tyro.cli(Command, args=argv, prog="megatron-apt checkpoint")))


def _convert(argv: list[str]) -> None:
    from megatron_apt.convert.command import Command, run

    sys.exit(run(tyro.cli(Command, args=argv, prog="megatron-apt convert")))


def _plan(argv: list[str]) -> None:
    from megatron_apt.plan import PlanConfig, plan

    if not argv or argv[0].startswith("-"):
        raise ValueError("usage: megatron-apt plan FILE.py:FUNCTION --memory [--ranks N] [--json FILE]")
    plan(load_recipe(argv[0]), tyro.cli(PlanConfig, args=argv[1:], prog=f"megatron-apt plan {argv[0]}"))


def _schedule(argv: list[str]) -> None:
    from megatron_apt.pipeline.command import ScheduleConfig, schedule

    schedule(tyro.cli(ScheduleConfig, args=argv, prog="megatron-apt schedule"))


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "demo": (_demo, "diffusion model in, one-step generator out, on real digits and clips, on a CPU"),
    "encode": (_encode, "videos and images with captions -> shards of latents and text embeddings"),
    "train": (_train, "train a recipe: FILE.py:FUNCTION [--field value ...]"),
    "sample": (_sample, "pictures and clips from a checkpoint"),
    "checkpoint": (_checkpoint, "inspect | verify | reshard a checkpoint"),
    "convert": (_convert, "import | export | verify: Hugging Face checkpoints in, diffusers pipelines out"),
    "plan": (_plan, "what a recipe needs on a cluster: memory of weights, gradients, optimiser and average"),
    "schedule": (_schedule, "what a pipeline of two networks costs: bubbles and memory, interleaved and phase by phase"),
    "report": (_report, "write the demo's report again from its results"),
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: megatron-apt COMMAND [options]\n")
        print("\n".join(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()))
        return
    if argv[0] not in COMMANDS:
        sys.exit(f"megatron-apt: no command {argv[0]!r}; there are {', '.join(COMMANDS)}")
    _quiet_libraries()
    with _readable_errors():
        COMMANDS[argv[0]][0](argv[1:])


def _quiet_libraries() -> None:
    """Hides notices that megatron.core and torch print on every machine without CUDA; everything else stays."""
    for message in (
        "Transformer Engine and Apex are not installed",
        "full scope is deprecated",
        ".*CUDA_DEVICE_MAX_CONNECTIONS",
        ".*torch.jit.script",
        ".*dynamic_context.py",
        ".*load_state_dict. is deprecated",
        ".*all_gather_into_tensor. is deprecated",  # newer torch; Megatron-Core calls it by this name
        ".*reduce_scatter_tensor. is deprecated",
        "torch.distributed is disabled, unavailable or uninitialized, assuming",  # of checkpoints read and written by one process
    ):
        warnings.filterwarnings("ignore", message=message)


@contextlib.contextmanager
def _readable_errors():
    """Expected failures end with one message instead of a traceback."""
    try:
        yield
    except EXPECTED as error:
        sys.exit(say_once(f"megatron-apt: {described(error)}"))
