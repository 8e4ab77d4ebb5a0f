"""The main job on real data: encode, diffusion, consistency, APT and the aR1 ablation on images, then on clips; a report after every stage.

Every stage leaves a mark when it is done and training checkpoints while it runs, so an interrupted demo continues where it was.
It runs data-parallel on the processes that launch.py starts.
"""

import contextlib
import fcntl
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from megatron_apt import recipes
from megatron_apt.checkpoint.store import write_atomically
from megatron_apt.config import ParallelConfig, RunConfig
from megatron_apt.data import digits
from megatron_apt.data.encode import EncodeConfig, encode
from megatron_apt.evaluate import suite
from megatron_apt.evaluate.report import write_report
from megatron_apt.models.text import train_sentencepiece
from megatron_apt.parallel import startup
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.progress import training_progress
from megatron_apt.recipes import DemoConfig
from megatron_apt.train import train


@dataclass(frozen=True)
class Stage:
    """A named piece of the demo."""

    name: str
    run: Callable[[Mesh], None]


def place(config: DemoConfig) -> recipes.Place:
    return recipes.Place(config.root, effort=0.05 if config.quick else 1.0)


def stages(config: DemoConfig) -> list[Stage]:
    """Everything the demo does, in order."""
    here = place(config)
    runs = {
        "images": [recipes.image_flow, recipes.image_consistency, recipes.image_apt, recipes.image_apt_without_ar1],
        "videos": [recipes.video_flow, recipes.video_consistency, recipes.video_apt],
    }
    result = []
    for section in ("images",) if config.stage == "images" else ("images", "videos"):
        result.append(Stage(f"{section}/encode", lambda mesh, section=section: ensure_digits(here, section)))
        for recipe in runs[section]:
            run = recipe(here)
            name = run.output.removeprefix(here.root + "/")
            rows = [row for row in suite.SUITES[section] if row.run == name]
            result.append(Stage(name, lambda mesh, run=run, name=name: _train(run, mesh, name)))
            result.append(
                Stage(f"{name}/evaluation", lambda mesh, section=section, rows=rows: suite.evaluate(here, section, rows, mesh, config.quick))
            )
    return result


def ensure_digits(here: recipes.Place, section: str) -> None:
    """Writes the digits as picture or video files and encodes them like anybody's; once, whichever process comes first."""
    output = here.data(section)
    with _lock(Path(here.root) / "data"):
        if (Path(output) / "dataset.json").exists():
            return
        tokenizer = here.data("tokenizer.model")
        if not Path(tokenizer).exists():
            things = [f"a handwritten {word}" for word in digits.WORDS]
            train_sentencepiece(things + [f"{t} moving {d}" for t in things for d in digits.DIRECTIONS], tokenizer, vocab_size=512)
        source = here.data(f"{section}-files")
        # Shift and scale bring latents near zero mean and unit variance. Clips are cut into whole groups of four frames: a first frame that
        # stands alone would leave channels at exactly zero in real data, by which a discriminator knows every generated sample.
        if section == "images":
            manifest = digits.write_digit_images(source)
            bucket = {"frames": 1, "height": 8, "width": 8, "pixel_temporal": 1, "pixel_shift": -0.39, "pixel_scale": 0.75}
        else:
            manifest = digits.write_digit_clips(source, frames=8, height=8, width=16, step=1)
            bucket = {"frames": 8, "height": 8, "width": 16, "pixel_causal": False, "pixel_shift": -0.69, "pixel_scale": 0.6}
        # The negative prompt is the empty one: a model that has read nothing but these captions knows no other.
        encode(EncodeConfig(str(manifest), output, **bucket, pixel_channels=1, tokenizer=tokenizer, text_width=32, negative_prompt=""))


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _train(run: RunConfig, mesh: Mesh, label: str) -> None:
    with training_progress(run, enabled=mesh.is_main, label=label) as report:
        train(run, mesh, report)


def run_demo(config: DemoConfig) -> None:
    """Runs what is not done yet, on this rank."""
    root = Path(config.root)
    root.mkdir(parents=True, exist_ok=True)
    mesh = startup.start(ParallelConfig())
    console = Console(soft_wrap=True, quiet=not mesh.is_main)
    progress = _load_progress(root, config)
    dist.barrier()
    remaining = [stage for stage in stages(config) if stage.name not in progress["done"]]
    for number, stage in enumerate(remaining, 1):
        console.rule(f"{stage.name}   ({number} of {len(remaining)})")
        began = time.perf_counter()
        try:
            stage.run(mesh)
            dist.barrier()
            progress["done"].append(stage.name)
        finally:
            spent = progress["seconds"].get(stage.name, 0.0) + time.perf_counter() - began
            progress["seconds"][stage.name] = round(spent, 2)
            if mesh.is_main:
                _save_progress(root, progress)
        if mesh.is_main and (number == len(remaining) or not remaining[number].name.endswith("/evaluation")):
            rewrite_report(config)
        console.print(f"{stage.name} took {spent:.1f} s; report: {root / 'report.html'}", highlight=False)
    if mesh.is_main:
        console.rule("done")
        _print_table(console, root)
        console.print(f"report: {rewrite_report(config)}\nresults: {root / 'results.json'}", highlight=False)
    startup.stop()


def _load_progress(root: Path, config: DemoConfig) -> dict:
    file = root / "progress.json"
    if not file.exists():
        return {"quick": config.quick, "done": [], "seconds": {}}
    progress = json.loads(file.read_text(encoding="utf-8"))
    if progress["quick"] != config.quick:
        raise ValueError(
            f"{file}: quick={progress['quick']}, this run asks for quick={config.quick}; give another --root, or remove {root} to start again"
        )
    return progress


def _save_progress(root: Path, progress: dict) -> None:
    write_atomically(root / "progress.json", json.dumps(progress, indent=1))


def rewrite_report(config: DemoConfig) -> Path:
    """Report and results.json from what is done so far."""
    root = Path(config.root)
    progress = _load_progress(root, config)
    pending = tuple(stage.name for stage in stages(config) if stage.name not in progress["done"])
    write_atomically(root / "results.json", json.dumps(suite.demo_results(place(config), progress["seconds"]), indent=1))
    text = json.dumps([asdict(recipe(place(config))) for recipe in (recipes.image_apt, recipes.video_apt)], indent=1)
    write_report(root / "report.html", suite.demo_report(place(config), progress["seconds"], pending, text))
    return root / "report.html"


def _print_table(console: Console, root: Path) -> None:
    results = json.loads((root / "results.json").read_text(encoding="utf-8"))
    for section in ("images", "videos"):
        for key, distance in results.get(section, {}).get("fd", {}).items():
            console.print(
                f"{section:7} {key:14} Frechet distance {distance:7.3f}   accuracy {results[section]['accuracy'][key]:.3f}", highlight=False
            )
