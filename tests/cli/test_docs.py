"""What the README and docs/ show is there: commands are parsed as the program parses
them, up to where their work would begin; links lead somewhere; Python runs; and the first
steps work as they are written.
"""

import contextlib
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_apt import cli
from megatron_apt.config import RunConfig, check_fits
from megatron_apt.demo.digits import write_digit_clips
from megatron_apt.recipe_files import find_recipe, load_recipe
from support.pipelines import save_wan

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WORK = (
    *(
        "megatron_apt.demo.processes.relaunch",
        "megatron_apt.demo.command.run_demo",
        "megatron_apt.demo.command.rewrite_report",
    ),
    *("megatron_apt.encode.command.encode", "megatron_apt.sample.command.sample_to_files"),
    *("megatron_apt.training.train.train", "megatron_apt.parallel.startup.stop"),
    *("megatron_apt.checkpoint.command.run", "megatron_apt.convert.command.run"),
    *("megatron_apt.plan.memory.plan", "megatron_apt.plan.schedule.schedule"),
    "megatron_apt.copy_examples.copy_examples",
)


FIRST_STEPS = ROOT / "docs" / "first-steps.md"
SNIPPET = re.compile(r'^```python(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```$', re.M | re.S)
SMALL = ("--iterations", "2", "--global-batch", "8", "--micro-batch", "8")
# Of save_wan's pipeline
TINY_WAN = shlex.split(
    "--model.depth 2 --model.width 24 --model.heads 2 --model.mlp-width 20 --model.latent-channels 4 "
    "--model.text-width 16 --model.dtype float32 --apt.head-layers 0.5 1 "
    "--parallel.tp 1 --parallel.cp 1 --iterations 2 --global-batch 2"
)


def shown(pages=PAGES) -> list[tuple[str, str]]:
    """(page, arguments of megatron-apt) of every line of code that starts it."""
    found = []
    for page in pages:
        for line in page.read_text(encoding="utf-8").splitlines():
            command = re.match(
                r"(?:    |\$ )(?:(?:srun|torchrun|mpirun)\b.*?)?"
                r"(?:-m megatron_apt|megatron-apt) +(?!\b(?:train\.sbatch)\b)(.*)",
                line,
            )
            if command and command[1].split()[0] in cli.COMMANDS:
                found.append((page.name, re.sub(r"\[([^]]*)\]", r"\1", re.split(r"\s+#", command[1])[0])))
    return found


# The commands of the first steps run, below
@pytest.mark.parametrize(
    ("page", "line"), shown([page for page in PAGES if page != FIRST_STEPS]), ids=lambda value: value
)
def test_commands_of_the_documentation_are_parsed(page, line, monkeypatch, capsys):
    for name in WORK:
        monkeypatch.setattr(name, lambda *arguments: None)
    monkeypatch.setattr("megatron_apt.parallel.startup.start", lambda parallel: SimpleNamespace(is_main=True))

    def recipe(spec: str) -> RunConfig:
        # The file and the function are there; some encode data when they are called
        find_recipe(str(ROOT / spec))
        return RunConfig(method="apt")

    monkeypatch.setattr(cli, "load_recipe", recipe)
    monkeypatch.setattr(
        "megatron_apt.training.progress.training_progress", lambda config, enabled: contextlib.nullcontext()
    )
    monkeypatch.chdir(ROOT)
    try:
        cli.main(shlex.split(line))
    except SystemExit as ended:
        assert ended.code in (0, None), (
            f"{page}: megatron-apt {line}: {ended.code}\n{capsys.readouterr().err}"
        )


def test_there_are_commands_to_parse():
    # `make` starts the demo
    assert {line.split()[0] for _, line in shown()} == {*cli.COMMANDS} - {"demo"}


def test_the_readme_is_short():
    assert 650 <= len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 780


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [
        target for target in targets if "://" not in target and not (page.parent / target).resolve().exists()
    ]
    assert not missing, f"{page.name}: {missing}"


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.name != "README.md"]
    assert [page for page in pages if f": {page}\n" not in menu] == []


def snippets() -> list[tuple[str, str]]:
    """(page, code) of every piece of Python of the pages, but for the first steps, which run as a whole."""
    return [
        (page.name, found["code"])
        for page in PAGES
        if page != FIRST_STEPS
        for found in SNIPPET.finditer(page.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize(("page", "code"), snippets(), ids=lambda value: value[:40])
def test_python_of_the_documentation_runs(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {"__name__": "snippet"})


def test_first_steps_work_as_they_are_written(tmp_path, monkeypatch, capsys):
    """Its files are written, its commands run in their order; on fewer pictures, with fewer updates."""
    monkeypatch.chdir(tmp_path)
    for found in SNIPPET.finditer(FIRST_STEPS.read_text(encoding="utf-8")):
        Path(found["title"]).write_text(found["code"], encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["measure.py", "pictures"])
    drawing = {"__name__": "draw_shapes"}
    exec(Path("draw_shapes.py").read_text(encoding="utf-8"), drawing)
    drawing["main"](count=40)
    exec(Path("measure.py").read_text(encoding="utf-8"), {})
    measured = capsys.readouterr().out.strip()
    assert re.fullmatch(r"--pixel-shift -0\.\d\d --pixel-scale 0\.\d\d", measured)
    captioned_clips(frames=8, side=24)
    commands = [shlex.split(line) for _, line in shown([FIRST_STEPS])]
    assert [command[0] for command in commands].count("train") >= 3
    for command in commands:
        if command[0] == "train":
            command += SMALL
            check_fits(load_recipe(command[1]))
        cli.main(command)
    assert all(Path("samples", run, "grid.png").exists() for run in ("flow", "consistency", "apt", "own"))
    monkeypatch.setattr(sys, "argv", ["measure_run.py", "runs/shapes/apt", "1"])
    exec(Path("measure_run.py").read_text(encoding="utf-8"), {})
    assert re.search(r"runs/shapes/apt, 1 steps: \d+\.\d\d ", capsys.readouterr().out)
    assert json.loads(Path("data/shapes/dataset.json").read_text())["shapes"] == {"3x1x16x16": 40}


@pytest.mark.slow
def test_the_readmes_wan_works_as_it_is_pasted(tmp_path, monkeypatch):
    """Its steps in their order, on a Wan that is tiny: none gets in another's way."""
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for _, line in shown([ROOT / "README.md"]) if "wan" in line]
    assert [command[0] for command in commands] == [
        "convert",
        "encode",
        "train",
        "train",
        "sample",
        "convert",
    ]
    save_wan(tmp_path).rename(commands[0][2])
    Path("examples").symlink_to(ROOT / "examples")
    captioned_clips(frames=49, side=32)
    sizes = {"train": TINY_WAN, "encode": ["--height", "32", "--width", "32", "--fps", "8"]}
    for command in commands:
        with contextlib.suppress(SystemExit):
            cli.main(command + sizes.get(command[0], []))
    assert Path("wan-one-step", "model_index.json").exists()
    assert [file.suffix for file in Path("samples", "wan").iterdir()] == [".mp4"]


def captioned_clips(frames: int, side: int) -> None:
    """Four files in clips/, each with its caption as a text file beside it."""
    manifest = write_digit_clips("clips", frames=frames, height=side, width=side, count=4)
    for line in map(json.loads, manifest.read_text().splitlines()):
        Path("clips", line["path"]).with_suffix(".txt").write_text(line["caption"])
    manifest.unlink()
