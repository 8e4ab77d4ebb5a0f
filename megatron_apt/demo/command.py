"""The main job on real data: encode, diffusion, consistency, APT and the aR1 ablation on
images, then on clips; a report after every stage.

Every stage leaves a mark when it is done and training checkpoints while it runs, so an
interrupted demo continues where it was. It runs data-parallel on the processes that
launch.py starts.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from megatron_apt.config import ParallelConfig, RunConfig
from megatron_apt.demo import digits, recipes, results, suite
from megatron_apt.demo import files as demo_files
from megatron_apt.demo.content import Section
from megatron_apt.demo.files import Progress
from megatron_apt.demo.interrupts import Interrupts
from megatron_apt.demo.machine import this_machine
from megatron_apt.demo.recipes import DemoConfig
from megatron_apt.demo.report import write_report
from megatron_apt.demo.strip import strip
from megatron_apt.encode.command import encode
from megatron_apt.encode.config import EncodeConfig
from megatron_apt.encoders.text import train_sentencepiece
from megatron_apt.files import write_atomically, write_product
from megatron_apt.lock import FolderLock
from megatron_apt.parallel import startup
from megatron_apt.parallel.agree import on_main
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.training.progress import training_progress
from megatron_apt.training.train import train


@dataclass(frozen=True)
class Stage:
    """A named piece of the demo."""

    name: str
    run: Callable[[Mesh], None]
    rows: tuple[suite.Measured, ...] = ()
    """What it measures."""


def place(config: DemoConfig) -> recipes.Place:
    return recipes.Place(config.root, effort=0.05 if config.quick else 1.0)


def stages(config: DemoConfig) -> list[Stage]:
    """Everything the demo does, in order."""
    here = place(config)
    runs = {
        "images": [
            recipes.image_flow,
            recipes.image_consistency,
            recipes.image_apt,
            recipes.image_apt_without_ar1,
        ],
        "videos": [recipes.video_flow, recipes.video_consistency, recipes.video_apt],
    }
    result = []
    for section in ("images",) if config.stage == "images" else ("images", "videos"):
        result.append(Stage(f"{section}/encode", lambda mesh, section=section: ensure_digits(here, section)))
        for recipe in runs[section]:
            run = recipe(here)
            name = run.output.removeprefix(here.root + "/")
            rows = tuple(row for row in suite.SUITES[section] if row.run == name)
            result.append(Stage(name, lambda mesh, run=run, name=name: _train(run, mesh, name)))
            measure = partial(suite.evaluate, here, section, rows, quick=config.quick)
            result.append(Stage(f"{name}/evaluation", measure, rows))
    return result


def ensure_digits(here: recipes.Place, section: str) -> None:
    """Writes the digits as picture or video files and encodes them like anybody's; once,
    whichever process comes first.
    """
    output = here.data(section)
    with _lock(Path(here.root) / "data"):
        if (Path(output) / "dataset.json").exists():
            return
        tokenizer, files = _ensure_tokenizer(here), here.data(f"{section}-files")
        if section == "images":
            manifest, settings = digits.write_digit_images(files), _PICTURES
        else:
            manifest, settings = digits.write_digit_clips(files, frames=8, height=8, width=16, step=1), _CLIPS
        encode(replace(settings, source=str(manifest), output=output, tokenizer=tokenizer))


# Shift and scale bring latents near zero mean and unit variance. The negative prompt is
# the empty one: a model that has read nothing but these captions knows no other.
_PICTURES = EncodeConfig(
    "",
    "",
    frames=1,
    height=8,
    width=8,
    pixel_channels=1,
    pixel_temporal=1,
    pixel_shift=-0.39,
    pixel_scale=0.75,
    text_width=32,
    negative_prompt="",
)
# Clips are cut into whole groups of four frames: a first frame that stands alone would
# leave channels at exactly zero in real data, by which a discriminator knows every
# generated sample.
_CLIPS = replace(
    _PICTURES,
    frames=8,
    width=16,
    pixel_temporal=4,
    pixel_causal=False,
    pixel_shift=-0.69,
    pixel_scale=0.6,
)


def _ensure_tokenizer(here: recipes.Place) -> str:
    """A sentencepiece model of all the captions there can be, so that images and clips share one."""
    file = here.data("tokenizer.model")
    if not Path(file).exists():
        things = [f"a handwritten {word}" for word in digits.WORDS]
        moving = [f"{thing} moving {direction}" for thing in things for direction in digits.DIRECTIONS]
        train_sentencepiece(things + moving, file, vocab_size=512)
    return file


@contextlib.contextmanager
def _lock(folder: Path) -> Generator[None]:
    with demo_files.named_failure(folder / ".lock"):
        folder.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644))
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _train(run: RunConfig, mesh: Mesh, label: str) -> None:
    with training_progress(run, enabled=mesh.is_main, label=label) as report:
        train(run, mesh, report)


def run_demo(config: DemoConfig) -> None:
    """Runs what is not done yet, on this rank.

    Raises:
        SystemExit: a signal ended it; the same command goes on there.
        ValueError: the folder is in use, cannot be written to, or holds a demo of another
            --quick.
    """
    mesh = startup.start(ParallelConfig())
    with Interrupts(config, mesh):
        with FolderLock(config.root, demo_files.WHAT, demo_files.OPTION, mesh):
            _run_stages(config, mesh)
        startup.stop()


def _run_stages(config: DemoConfig, mesh: Mesh) -> None:
    root = Path(config.root)
    console = Console(soft_wrap=True, quiet=not mesh.is_main)
    progress = on_main(mesh, lambda: demo_files.load_progress(config))
    remaining = on_main(mesh, lambda: [stage.name for stage in _remaining(config, progress)])
    chosen = {stage.name: stage for stage in stages(config)}
    for number, name in enumerate(remaining, 1):
        console.rule(f"{name}   ({number} of {len(remaining)})")
        began = time.perf_counter()
        try:
            chosen[name].run(mesh)
            dist.barrier()
            progress["done"] = [*(done for done in progress["done"] if done != name), name]
        finally:
            spent = progress["seconds"].get(name, 0.0) + time.perf_counter() - began
            progress["seconds"][name] = round(spent, 2)
            progress["machine"] = this_machine()
            if mesh.is_main:
                demo_files.save_progress(root, progress)
        if number == len(remaining) or not remaining[number].endswith("/evaluation"):
            on_main(mesh, lambda: str(rewrite_report(config)))
        console.print(f"{name} took {spent:.1f} s; report: {root / 'report.html'}", highlight=False)
    on_main(mesh, lambda: _conclude(config, console))


def _remaining(config: DemoConfig, progress: Progress) -> list[Stage]:
    """Stages that are not done, or whose figures are gone or damaged."""
    here = place(config)

    def is_done(stage: Stage) -> bool:
        if stage.name not in progress["done"]:
            return False
        trouble = next(
            filter(None, (suite.trouble(here, stage.name.partition("/")[0], row) for row in stage.rows)), ""
        )
        if trouble:
            print(f"{trouble}; measured again")
        return not trouble

    return [stage for stage in stages(config) if not is_done(stage)]


def _conclude(config: DemoConfig, console: Console) -> None:
    report = rewrite_report(config)
    console.rule("done")
    progress = demo_files.found_progress(Path(config.root))
    _print_table(console, results.demo_results(place(config), progress))
    console.print(f"report: {report}\nresults: {report.with_name('results.json')}", highlight=False)


def rewrite_report(config: DemoConfig) -> Path:
    """Report, results.json and strips of pictures from what is done so far.

    Raises:
        ValueError: no demo there, one of its files is damaged, or the report cannot be
            written.
    """
    root = Path(config.root)
    progress = demo_files.found_progress(root)
    config = replace(config, quick=progress["quick"])
    here = place(config)
    pending = tuple(stage.name for stage in stages(config) if stage.name not in progress["done"])
    configurations = [asdict(recipe(here)) for recipe in (recipes.image_apt, recipes.video_apt)]
    report = results.demo_report(here, progress, pending, json.dumps(configurations, indent=1))
    measured = json.dumps(results.demo_results(here, progress), indent=1)
    demo_files.write(root / "results.json", lambda file: write_atomically(file, measured))
    for section in report.sections:
        _write_strip(root, section, report.trial)
    demo_files.write(root / "report.html", lambda file: write_report(file, report))
    return root / "report.html"


def _write_strip(root: Path, section: Section, trial: bool) -> None:
    """strip.png of pictures, clips.gif of clips."""
    if found := strip(section, trial):
        data, kind = found
        name = {"png": "strip.png", "gif": "clips.gif"}[kind]
        demo_files.write(root / name, lambda file: write_product(file, data))


def _print_table(console: Console, measured: dict) -> None:
    for section in suite.SUITES:
        figures = measured.get(section, {"fd": {}})
        for key, distance in figures["fd"].items():
            accuracy = figures["accuracy"][key]
            line = f"{section:7} {key:14} Frechet distance {distance:7.3f}   accuracy {accuracy:.3f}"
            console.print(line, highlight=False)
