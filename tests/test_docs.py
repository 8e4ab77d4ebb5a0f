"""Commands that the README and docs/ show are commands that there are: each is parsed as
the program parses it, up to where its work would begin.
"""

import contextlib
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_apt import cli
from megatron_apt.config import RunConfig
from megatron_apt.recipe_files import find_recipe

ROOT = Path(__file__).parents[1]
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


def shown() -> list[tuple[str, str]]:
    """(page, arguments of megatron-apt) of every line of code that starts it."""
    found = []
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            command = re.match(
                r"(?:    |\$ )(?:(?:srun|torchrun|mpirun)\b.*?)?"
                r"(?:-m megatron_apt|megatron-apt) +(?!\b(?:train\.sbatch)\b)(.*)",
                line,
            )
            if command and command[1].split()[0] in cli.COMMANDS:
                found.append((page.name, re.sub(r"\[([^]]*)\]", r"\1", re.split(r"\s+#", command[1])[0])))
    return found


@pytest.mark.parametrize(("page", "line"), shown(), ids=lambda value: value)
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
