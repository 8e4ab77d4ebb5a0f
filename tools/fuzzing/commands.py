"""Command lines and recipes: values that no option takes, and recipe files that are none."""

import os
import random
import shlex
import shutil
from pathlib import Path
from unittest import mock

from fuzzing.boundary import Boundary, Input, Outcome, command, judged
from fuzzing.datasets import recipe, warm_run, write_run

_VALUES = (
    *(
        "-1",
        "0",
        "1",
        "2",
        "3",
        "1000000",
        "1000000000000000000",
        "1e400",
        "nan",
        "inf",
        "-inf",
        "1.5",
        "1e-9",
    ),
    *(
        "",
        " ",
        "x",
        "é",
        "None",
        "True",
        "[]",
        "../..",
        "/dev/null",
        "/proc/self/mem",
        "a" * 5000,
        "\x1b[31m",
        "-",
        "--",
        "=",
    ),
    *("NOWHERE", "FILE", "RUN", "DATA"),
)
# What each command is tried with; a value of one option is replaced. {valid} and {folder} are filled in.
_LINES = {
    "encode": "--source {valid}/files --output {folder}/out --height 16 --width 16 --frames 1 --fps 0 "
    "--stride 1 --start 0 --codec pixel "
    "--codec-path '' --pixel-channels 3 --pixel-temporal 1 --pixel-spatial 1 --pixel-scale 1.0 "
    "--pixel-shift 0 "
    "--text builtin --text-width 8 --vocab-size 512 "
    "--tokenizer '' --negative-prompt x --samples-per-shard 4 --max-rejected 0.5 --device cpu",
    "sample": "{valid}/run --prompts 'picture 1' --seeds 0 --steps 1 --guidance 1 --weights ema --size '1 "
    "4 4' --dataset {valid}/data --format png "
    "--fps 8 --scale 1 --out {folder}/samples --negative-prompt '' --image ''",
    "train": "{recipe} --iterations 1 --global-batch 4 --micro-batch 4 --seed 0 --save-every 1 --log-every "
    "1 --output {folder}/run --model.depth 3 "
    "--model.width 24 --model.heads 2 --model.latent-channels 12 --model.text-width 8 --model.patch '1 2 "
    "2' "
    "--model.dtype float32 --data.shards {valid}/data --data.block 4 --data.text-length 4 --optimizer.lr "
    "1e-3 --optimizer.ema 0.9 "
    "--optimizer.warmup 0 --init.generator '' "
    "--parallel.tp 1 --parallel.cp 1 --parallel.pp 1 --kernels auto --guards.rank-timeout 60 "
    "--retention.last 2",
    "plan": "{recipe} --ranks 2 --calibration '' --json ''",
    "schedule": "--ranks 2 --microbatches 2 --iterations 1 --cost F=1,I=1,W=1 --cap 0 --evaluations 0 "
    "--message 0 --discriminator 1 --chunks 0 "
    "--dump {folder}/dump --json {folder}/json --picture ''",
    "checkpoint inspect": "{valid}/run --json {folder}/json",
    "checkpoint verify": "{valid}/run",
    "checkpoint reshard": "{valid}/run {folder}/copy --parallel.tp 1",
    "convert import": "{valid}/run {folder}/copy --subfolder '' --config '' --json ''",
    "convert export": "{valid}/run {folder}/copy --base '' --dtype stored --shard-bytes 1000000 --license "
    "other",
    "convert verify": "{valid}/run {valid}/run --tolerance 1e-5 --samples 1 --seed 0",
    "report": "--root {folder}/demo --stage all",
    "nothing": "",
}
_RECIPES = {
    "a syntax error": "def run(:\n",
    "an import of nothing": "import nothing_of_that_name\n\ndef run():\n    pass\n",
    "no function": "x = 1\n",
    "another result": "def run():\n    return 3\n",
    "an argument": "def run(x):\n    return x\n",
    "a wrong field": "from megatron_apt.config import RunConfig\n\ndef run():\n    return "
    "RunConfig(iteration=3)\n",
    "a wrong value": "from megatron_apt.config import RunConfig\n\ndef run():\n    return "
    "RunConfig(iterations=-3)\n",
    "a value of another type": "from megatron_apt.config import RunConfig\n\ndef run():\n    return "
    "RunConfig(iterations='3')\n",
    "no UTF-8": "# caf\xe9\ndef run():\n    pass\n",
    "NUL": "x = 1\x00\n",
    "nothing": "",
    "an indentation": " def run():\n\tpass\n",
}


def _make(rng: random.Random, valid: Path, folder: Path) -> Input:
    (folder / "FILE").write_text("a file")
    shutil.copytree(valid / "run", folder / "RUN")
    (folder / "DATA").symlink_to(valid / "data")
    spec = recipe(folder / "recipe.py", valid / "data", folder / "run", batch=4)
    kind = rng.random()
    if kind < 0.25:
        return _recipe(rng, folder) if kind < 0.13 else _environment(rng, spec)
    name = rng.choice(list(_LINES))
    words = [word.format(valid=valid, folder=folder, recipe=spec) for word in shlex.split(_LINES[name])] or [
        ""
    ]
    what, option = _change(rng, words)
    names = (
        option,
        option.replace("-", "_"),
        option.split(".")[-1].replace("-", "_"),
        str(valid),
        "FILE",
        "NOWHERE",
        "Missing from",
        "no command",
        what.split("'")[1][:40],
    )
    line = [
        part
        for word in words
        for part in (word.split() if word.strip() and "/" not in word and word != "picture 1" else [word])
    ]
    return Input(f"{name}: {what}", tuple(filter(None, names)), settings={"line": [*name.split(), *line]})


def _change(rng: random.Random, words: list[str]) -> tuple[str, str]:
    """Another value, an option less or one more; returns what, and the option's name."""
    values = [i for i, word in enumerate(words) if not word.startswith("--")]
    place, how = rng.choice(values), rng.random()
    option = words[place - 1].removeprefix("--") if place and words[place - 1].startswith("--") else ""
    if how < 0.9:
        value = rng.choice(_VALUES)
        words[place] = " ".join([value] * len(words[place].split())) if value and option == "size" else value
        return f"{option or 'argument'} {words[place][:40]!r}", option
    if how < 0.95:
        del words[place - bool(option) : place + 1]
        return f"no {option or 'argument'} ''", option
    words.append(rng.choice(("--nothing", "-x", "--help", "-h", "--version")))
    return f"also {words[-1]!r}", ""


def _recipe(rng: random.Random, folder: Path) -> Input:
    what = rng.choice([*_RECIPES, "a folder", "no suffix", "missing", "no name"])
    file = folder / ("bad" if what == "no suffix" else "bad.py")
    if what == "a folder":
        file.mkdir()
    elif what != "missing":
        file.write_bytes(_RECIPES.get(what, "def run():\n    pass\n").encode("latin-1"))
    line = [rng.choice(("train", "plan")), str(file) if what == "no name" else f"{file}:run"]
    return Input(f"{line[0]}: a recipe with {what}", ("bad", "iteration"), settings={"line": line})


def _environment(rng: random.Random, spec: str) -> Input:
    """Half of what a launcher sets, or nonsense of it."""
    whole = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(rng.randrange(20_000, 30_000)),
    }
    nonsense = ("", " ", "x", "-1", "99", "1e3", "1" * 50, "0x1", "１")
    how = rng.random()
    if how < 0.6:
        name = rng.choice(("RANK", "LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE"))
        environment = {
            **whole,
            name: rng.choice(("", " ", "x", "-1", "0x1", "1e3") if name == "WORLD_SIZE" else nonsense),
        }
    elif how < 0.8:
        environment = {
            name: rng.choice(("2", "x", "0"))
            for name in rng.sample(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"), rng.choice((1, 2)))
        }
        if {"RANK", "WORLD_SIZE"} <= environment.keys():
            del environment["RANK"]
    else:
        name = rng.choice(("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))
        environment = {name: rng.choice(("2", "x")), "SLURM_STEP_ID": rng.choice(("0", "x"))}
    names = (*environment, "process", "launcher")
    return Input(
        f"train: in {environment}", names, settings={"line": ["train", spec], "environment": environment}
    )


def _run(case: Input, valid: Path, folder: Path) -> Outcome:
    with mock.patch.dict(os.environ, case.settings.get("environment", {})):
        return judged(command(*case.settings["line"]), case, folder)


COMMANDS = Boundary("commands", 12, write_run, _make, _run, warm_run)
