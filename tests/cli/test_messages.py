"""Natural mistakes on the command line: one message that names what is wrong and what to
do, before anything is run.
"""

import io
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megatron_apt.cli import COMMANDS, main
from megatron_apt.models.condition import Condition
from megatron_apt.sample import command as sample
from megatron_apt.sample.command import _file_name, load_generator
from megatron_apt.sample.config import SampleConfig
from megatron_apt.training.train import train
from support.runs import config


def ended(argv: list[str]) -> object:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    return stopped.value.code


@pytest.fixture(scope="module")
def run(mesh, datasets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow") / "run"
    train(config(datasets, folder, "flow", iterations=1), mesh)
    return str(folder)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert ended([command, "--help"]) == 0
    assert f"usage: megatron-apt {command}" in capsys.readouterr().out


def test_help_of_a_recipe_runs_nothing_of_it(tmp_path, capsys):
    file = tmp_path / "recipe.py"
    file.write_text("raise SystemExit('was run')\ndef run(): ...\n")
    for command in ("train", "plan"):
        assert ended([command, f"{file}:run", "--help"]) == 0
        assert "was run" not in capsys.readouterr().out


def test_version_and_commands_that_are_not(capsys):
    main(["--version"])
    assert capsys.readouterr().out.startswith("megatron-apt 0.")
    assert "did you mean 'train'?" in ended(["trian"]) and "did you mean 'encode'?" in ended(["Encode"])


@pytest.mark.parametrize(
    ("text", "function", "message"),
    [
        (None, "run", "there is no file"),
        ("def run(:\n    pass\n", "run", r"recipe.py:1: "),
        ("  x = 1\ny = 2\n", "run", "recipe.py:"),
        ("def run(): return None\n", "run", "returned NoneType, not a RunConfig"),
        ("def run(): return {}['width']\n", "run", "recipe.py:1: KeyError: 'width'"),
        ("import nowhere_at_all\ndef run(): ...\n", "run", "recipe.py:1: ModuleNotFoundError"),
        ("def run(): ...\n", "rum", "did you mean 'run'?"),
        ("def run(): ...\n", "", "names no function"),
        ("x = '\x00'\ndef run(): ...\n", "run", "is not Python"),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_recipes_that_cannot_be_used(command, text, function, message, tmp_path):
    file = tmp_path / "recipe.py"
    if text is not None:
        file.write_text(text)
    assert message in ended([command, f"{file}:{function}" if function else str(file)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "0", "8", "8"], "size=(0, 8, 8)"),
        (["--size", "1000000", "1000000", "1000000"], "latent positions"),
        (["--scale", "0"], "scale=0"),
        (["--scale", "1000000"], "scale=1000000"),
        (["--steps", "0"], "steps=0"),
        (["--guidance", "nan"], "guidance=nan"),
        (["--fps", "0"], "fps=0.0"),
        (["--fps", "inf"], "fps=inf"),
        (["--seeds"], "seeds=()"),
        (["--seeds", "-1"], "seeds=(-1,)"),
        (["--prompts", "a \udcff"], "not UTF-8"),
        (["--decode-tiling", "-3"], "decode_tiling=-3"),
    ],
)
def test_sample_refuses_numbers_that_mean_nothing(options, message, capsys):
    assert ended(["sample", "nowhere", *options]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_sample_looks_at_its_output_before_it_loads_anything(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        assert "is not a folder" in ended(["sample", "nowhere", "--out", str(tmp_path / place)])
    assert "does not exist" in ended(
        ["sample", "nowhere", "--image", str(tmp_path / "no.png"), "--out", str(tmp_path)]
    )
    assert "no checkpoint there" in ended(["sample", str(tmp_path), "--out", str(tmp_path)])


def test_sample_says_what_is_seldom_meant(run, tmp_path, capsys, mesh):
    out = str(tmp_path / "out")
    main(["sample", run, "--prompts", "a", "red", "fox", "--out", out])
    shown = capsys.readouterr().err
    assert (
        "3 prompts of one word each ('a', 'red', 'fox')" in shown
        and "not trained for so few Euler steps" in shown
    )
    assert not load_generator(run, mesh).one_step
    assert "have one frame" in ended(
        ["sample", run, "--size", "1", "8", "8", "--format", "mp4", "--out", out]
    )
    assert "do not divide it" in ended(["sample", run, "--size", "1", "3", "8", "--out", out])
    assert "scale=9000" in ended(["sample", run, "--size", "1", "8", "8", "--scale", "9000", "--out", out])


def test_prompts_of_any_script_make_file_names(run, tmp_path, capsys):
    prompts = [
        "一只红色的狐狸在雪地上奔跑" * 8,
        "🦊" * 100,
        "/../../etc/passwd",
        "\n",
        "a" * 10_000,
        "é" * 200,
    ]
    main(["sample", run, "--prompts", *prompts, "--out", str(tmp_path / "out")])
    names = [file.name for file in (tmp_path / "out").iterdir()]
    assert len(names) == len(prompts) + 1  # and the grid
    assert max(len(os.fsencode(name)) for name in names) < 120
    assert _file_name("é" * 200).startswith("é" * 39) and _file_name("🦊") == "empty"


def test_prompts_of_scripts_without_spaces_are_no_single_words(run, tmp_path, capsys):
    main(["sample", run, "--prompts", "红色的狐狸", "蓝色的海", "--out", str(tmp_path / "out")])
    assert "one word each" not in capsys.readouterr().err


def test_two_steps_are_the_papers_procedure_only_where_there_is_one(run, mesh, monkeypatch):
    called = []
    for name in ("one_step", "two_steps", "euler"):
        monkeypatch.setattr(
            sample.Sampler, name, lambda self, z, *rest, name=name: called.append((name, rest)) or z
        )
    loaded = load_generator(run, mesh)
    condition = Condition.pack([torch.zeros(3, loaded.model.model.text_width)], loaded.text_length)
    for one_step in (False, True):
        shape = (loaded.model.model.latent_channels, 1, 8, 8)
        settings = SampleConfig("", steps=2)
        sample.sample_latents(
            replace(loaded, one_step=one_step),
            mesh,
            condition,
            condition,
            shape,
            torch.zeros(1, dtype=torch.int64),
            0,
            settings,
        )
    assert [name for name, _ in called] == ["euler", "two_steps"] and called[0][1] == (2, 1.0)


@pytest.mark.parametrize("kind", [OSError, MemoryError, BrokenPipeError])
def test_errors_of_the_system_are_one_message(kind, monkeypatch):
    def fail(argv):
        raise kind(28, "No space left on device", "/data/x") if kind is OSError else kind()

    monkeypatch.setitem(COMMANDS, "plan", COMMANDS["plan"]._replace(run=fail))
    code = ended(["plan"])
    assert isinstance(code, str) and code.startswith("megatron-apt: ")
    if kind is OSError:
        assert (
            code
            == "megatron-apt: /data/x: No space left on device; free disk space and start the command again"
        )


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ([], ["--help"]),
        (["-u"], ["--help"]),
        ([], ["schedule", "--ranks", "2", "--microbatches", "2"]),
        pytest.param(["-u"], ["schedule", "--ranks", "2", "--microbatches", "2"], marks=pytest.mark.slow),
    ],
)
def test_a_reader_that_has_left_ends_a_command_quietly(options, command):
    """`| head`, however the output is buffered, and whether rich or print has written it."""
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, *options, "-m", "megatron_apt", *command]
    done = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_says_what_is_left(name, monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, name, COMMANDS[name]._replace(run=interrupted))
    assert ended([name]) == 130
    assert COMMANDS[name].interrupted in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer.lr", "inf"], "optimizer.lr=inf"),
        (["--optimizer.betas", "0.9", "nan"], "optimizer.betas=(0.9, nan)"),
        (["--optimizer.alpha", "nan"], "optimizer.alpha=nan"),
        (["--apt.ar1-lambda", "inf"], "apt.ar1_lambda=inf"),
        (["--iterations", str(10**30)], f"iterations={10**30}"),
        (["--seed", "-1"], "seed=-1"),
        (["--global-batch", "0"], "global_batch=0"),
        (["--output", " "], "output=' '"),
        (["--parallel.timeout-minutes", "-1"], "parallel.timeout_minutes=-1.0"),
        (["--parallel.timeout-minutes", "nan"], "parallel.timeout_minutes=nan"),
        (["--flow.logit-std", "-1"], "flow.logit_std=-1.0"),
        (["--consistency.guidance-scale", "-2"], "consistency.guidance_scale=-2.0"),
        (["--guards.collapse-window", "-1"], "guards.collapse_window=-1"),
        (["--guards.collapse-d-loss", "-0.5"], "guards.collapse_d_loss=-0.5"),
    ],
)
def test_settings_of_training_are_numbers_that_mean_something(options, message, tmp_path, capsys):
    (tmp_path / "recipe.py").write_text(
        "from megatron_apt.config import RunConfig\ndef run():\n    return RunConfig()\n"
    )
    assert ended(["train", f"{tmp_path / 'recipe.py'}:run", *options]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    "argv",
    [
        ["checkpoint", "inspect", "nowhere"],
        ["convert", "import", "nowhere", "target"],
        ["convert", "export", "nowhere", "target"],
        ["convert", "verify", "nowhere", "source"],
    ],
    ids=lambda argv: argv[1],
)
def test_figures_that_cannot_be_written_are_found_before_the_work(argv, tmp_path):
    (tmp_path / "file").write_text("")
    for place, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "a.json", "there is no folder"),
        (tmp_path / "file" / "a.json", "Not a dir"),
    ):
        told = ended([*argv, "--json", str(place)])
        assert f"json={place}: " in told and message in told


def test_names_that_the_terminal_cannot_show_are_escaped(monkeypatch, mesh):
    """The name of a file that is not UTF-8, where standard output is; and another letter
    where it is ASCII.
    """
    for encoding, text, shown in (("utf-8", "a\udcff", b"a\\udcff"), ("ascii", "é", b"\\xe9")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr("sys.stdout", stream)
        monkeypatch.setitem(
            COMMANDS, "plan", COMMANDS["plan"]._replace(run=lambda argv, text=text: print(text))
        )
        main(["plan"])
        assert stream.buffer.getvalue() == shown + b"\n"


def test_a_closed_standard_output_ends_nothing(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setitem(COMMANDS, "plan", COMMANDS["plan"]._replace(run=lambda argv: print("lost")))
    main(["plan"])


def test_no_iterations_are_nothing_to_train(mesh, datasets, tmp_path, capsys):
    train(config(datasets, tmp_path / "none", "flow", iterations=0), mesh)
    assert "iterations=0: there is nothing to train" in capsys.readouterr().out
