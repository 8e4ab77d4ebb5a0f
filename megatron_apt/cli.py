"""megatron-apt: one console script over the package. Every command prints its options with --help."""

import contextlib
import difflib
import importlib.metadata
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Generator
from typing import NamedTuple, NoReturn

import tyro

from megatron_apt.config import RunConfig
from megatron_apt.errors import LOST, described, is_expected, is_lost_rank, standard_output_is_closed
from megatron_apt.once import say_once
from megatron_apt.recipe_files import find_recipe, load_recipe
from megatron_apt.training import signals

_INTERRUPTED = 128 + signal.SIGINT
_RECIPE = "FILE.py:FUNCTION"
_HELP = ("-h", "--help")


def _demo(argv: list[str]) -> None:
    from megatron_apt.demo.processes import relaunch
    from megatron_apt.demo.recipes import DemoConfig

    config = _parsed(DemoConfig, argv, "demo")
    relaunch(config)
    from megatron_apt.demo.command import run_demo

    run_demo(config)


def _encode(argv: list[str]) -> None:
    from megatron_apt.encode.command import encode
    from megatron_apt.encode.config import EncodeConfig

    encode(_parsed(EncodeConfig, argv, "encode"))


def _train(argv: list[str]) -> None:
    spec, rest = _recipe(argv, "train", RunConfig)
    config = _parsed(RunConfig, rest, f"train {spec}", default=load_recipe(spec))
    from megatron_apt.parallel import startup
    from megatron_apt.training.progress import training_progress
    from megatron_apt.training.train import train

    signals.requeue_with(config.guards.requeue_code)
    mesh = startup.start(config.parallel)
    try:
        with training_progress(config, enabled=mesh.is_main) as report:
            train(config, mesh, report)
    finally:
        startup.stop()


def _sample(argv: list[str]) -> None:
    from megatron_apt.sample.config import SampleConfig

    config = _parsed(SampleConfig, argv, "sample")
    from megatron_apt.sample.command import sample_to_files

    sample_to_files(config)


def _report(argv: list[str]) -> None:
    from megatron_apt.demo.command import rewrite_report
    from megatron_apt.demo.recipes import DemoConfig

    print(rewrite_report(_parsed(DemoConfig, argv, "report")))


def _checkpoint(argv: list[str]) -> None:
    from megatron_apt.checkpoint.command import Command, run

    sys.exit(run(_parsed(Command, argv, "checkpoint")))


def _convert(argv: list[str]) -> None:
    from megatron_apt.convert.command import Command, run

    sys.exit(run(_parsed(Command, argv, "convert")))


def _plan(argv: list[str]) -> None:
    from megatron_apt.plan.memory import PlanConfig, plan

    spec, rest = _recipe(argv, "plan", PlanConfig)
    config = _parsed(PlanConfig, rest, f"plan {spec}")
    plan(load_recipe(spec), config)


def _schedule(argv: list[str]) -> None:
    from megatron_apt.plan.schedule import ScheduleConfig, schedule

    schedule(_parsed(ScheduleConfig, argv, "schedule"))


def _examples(argv: list[str]) -> None:
    from megatron_apt.copy_examples import ExamplesConfig, copy_examples

    copy_examples(_parsed(ExamplesConfig, argv, "examples"))


def _recipe(argv: list[str], command: str, kind: type) -> tuple[str, list[str]]:
    """The recipe and what follows it.

    Help is given without running the recipe, which may encode data first.

    Raises:
        ValueError: the first argument is no recipe.
    """
    spec, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    if any(word in _HELP for word in rest):
        if spec:
            find_recipe(spec)
        print(f"Defaults shown are those of {kind.__name__}; a recipe ({_RECIPE}) sets its own.\n")
        _parsed(kind, ["--help"], f"{command} {spec or _RECIPE}")
    if not spec:
        raise ValueError(
            f"usage: megatron-apt {command} {_RECIPE} [--field value ...]; megatron-apt {command} --help "
            "shows the fields"
        )
    return spec, rest


def _parsed(kind, argv: list[str], command: str, **options):
    """Settings from the command line. What does not fit ends the program with a message, code 2."""
    return tyro.cli(kind, args=argv, prog=f"megatron-apt {command}", **options)


class Command(NamedTuple):
    run: Callable[[list[str]], None]
    text: str
    interrupted: str = "nothing was written"
    """What Ctrl-C leaves, where the command does not say so itself."""


_GOES_ON = "the same command goes on where it was"
COMMANDS: dict[str, Command] = {
    "demo": Command(
        _demo, "diffusion model in, one-step generator out, on real digits and clips, on a CPU", _GOES_ON
    ),
    "encode": Command(
        _encode, "videos and images with captions -> shards of latents and text embeddings", _GOES_ON
    ),
    "train": Command(
        _train,
        "train a recipe: FILE.py:FUNCTION [--field value ...]",
        "the same command goes on from the last checkpoint",
    ),
    "sample": Command(_sample, "pictures and clips from a checkpoint", "samples written before are whole"),
    "checkpoint": Command(
        _checkpoint,
        "inspect | verify | reshard a checkpoint",
        "no half checkpoint is left under a whole one's name",
    ),
    "convert": Command(
        _convert, "import | export | verify: Hugging Face checkpoints in, diffusers pipelines out", _GOES_ON
    ),
    "plan": Command(
        _plan, "what a recipe needs on a cluster: memory of weights, gradients, optimiser and average"
    ),
    "schedule": Command(
        _schedule, "what a pipeline of two networks costs: bubbles and memory, interleaved and phase by phase"
    ),
    "examples": Command(
        _examples,
        "copy the recipes, the batch script and the tools into a folder: examples [FOLDER]",
        "remove the files that it wrote, and start it again",
    ),
    "report": Command(_report, "write the demo's report again from its results"),
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    _print_anything()
    if not argv or argv[0] in _HELP:
        command, argv = Command(_help, "the commands"), ["--help"]
    elif argv[0] in ("--version", "-V"):
        command = Command(_version, "the version")
    elif argv[0] in COMMANDS:
        command = COMMANDS[argv[0]]
    else:
        close = difflib.get_close_matches(argv[0].lower(), COMMANDS, 1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        sys.exit(f"megatron-apt: no command {argv[0]!r}; {meant}There are {', '.join(COMMANDS)}")
    _quiet_libraries()
    with _readable_errors(command):
        command.run(argv[1:])


def _help(argv: list[str]) -> None:
    print("usage: megatron-apt COMMAND [options]\n")
    print("\n".join(f"  {name:10} {command.text}" for name, command in COMMANDS.items()))
    print("\nmegatron-apt COMMAND --help shows the options of one; megatron-apt --version the version.")


def _version(argv: list[str]) -> None:
    print(f"megatron-apt {importlib.metadata.version('megatron_apt')}")


def _print_anything() -> None:
    """Names and captions that the terminal's encoding lacks are printed escaped, instead
    of ending a command whose work is done.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # it is closed
                stream.reconfigure(errors="backslashreplace")


def _quiet_libraries() -> None:
    """Hides notices that megatron.core and torch print on every machine without CUDA."""
    for message in (
        "Transformer Engine and Apex are not installed",
        "full scope is deprecated",
        ".*CUDA_DEVICE_MAX_CONNECTIONS",
        ".*torch.jit.script",
        ".*dynamic_context.py",
        ".*load_state_dict. is deprecated",
        ".*all_gather_into_tensor. is deprecated",  # newer torch; Megatron-Core calls it by this name
        ".*reduce_scatter_tensor. is deprecated",
        # Of checkpoints read and written by one process
        "torch.distributed is disabled, unavailable or uninitialized, assuming",
    ):
        warnings.filterwarnings("ignore", message=message)


@contextlib.contextmanager
def _readable_errors(command: Command) -> Generator[None]:
    """Expected failures end with one message instead of a traceback."""
    try:
        yield
        if sys.stdout is not None:  # it is None where it was closed before the start
            sys.stdout.flush()
    except KeyboardInterrupt as interrupted:
        print(f"megatron-apt: {str(interrupted) or 'interrupted; ' + command.interrupted}", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except (SystemExit, Exception) as error:
        if standard_output_is_closed(error):
            _end_quietly()
        if isinstance(error, SystemExit):
            raise
        if is_lost_rank(error):
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:500]}"
            said = say_once(
                f"megatron-apt: another rank died or does not answer ({reason}); look for its message, and "
                "start all of them again"
            )
            if isinstance(said, str):
                print(said, file=sys.stderr, flush=True)
            sys.exit(LOST)
        if not is_expected(error):
            raise
        sys.exit(say_once(f"megatron-apt: {described(error)}"))


def _end_quietly() -> NoReturn:
    """Whoever read our output (`| head`) has enough of it: ends as other programs do then."""
    # Or the interpreter complains when it flushes
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)
