"""The command line: recipes, overrides, readable errors, samples on disk."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from megatron_apt.cli import main
from megatron_apt.config import ParallelConfig, RunConfig, check_fits
from megatron_apt.families.mmdit.config import MMDiTConfig
from megatron_apt.recipe_files import load_recipe
from megatron_apt.training.train import train
from support.runs import config


def fails(argv, capsys=None) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    return str(stopped.value.code)


@pytest.fixture
def recipe(tmp_path, datasets):
    file = tmp_path / "recipe.py"
    file.write_text(
        "from pathlib import Path\nfrom support.runs import config\n"
        f"def run():\n    return config(Path({str(datasets)!r}), {str(tmp_path / 'out')!r}, 'flow', "
        "iterations=2, log_every=1)\n"
        "def wrong():\n    return 3\n"
    )
    return str(file)


def test_train_and_sample(recipe, tmp_path, capsys):
    main(["train", f"{recipe}:run", "--optimizer.lr", "0.002"])
    shown = capsys.readouterr().out
    assert "flow 1/2" in shown and "flow 2/2" in shown and "loss" in shown
    out = tmp_path / "pictures"
    prompts = ["--prompts", "a handwritten seven", "a handwritten two", "--seeds", "0", "1"]
    main(["sample", str(tmp_path / "out"), *prompts, "--out", str(out), "--scale", "2"])
    files = sorted(p.name for p in out.iterdir())
    assert files == sorted(
        [f"{i:03d}-a-handwritten-{w}-seed{s}.png" for i, w in enumerate(("seven", "two")) for s in (0, 1)]
        + ["grid.png"]
    )
    assert Image.open(out / "grid.png").size[0] >= 2 * 16
    main(
        [
            "sample",
            str(tmp_path / "out"),
            "--size",
            "2",
            "8",
            "16",
            "--format",
            "gif",
            "--steps",
            "2",
            "--weights",
            "raw",
            "--out",
            str(out),
        ]
    )
    assert len(list(out.glob("*.gif"))) > 0
    assert Image.open(next(out.glob("*.gif"))).n_frames == 5


def test_unknown_fields_are_named(recipe, capsys):
    with pytest.raises(SystemExit):
        main(["train", f"{recipe}:run", "--apt.lamda", "3"])
    assert "--apt.lamda" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fly"], "no command 'fly'"),
        (["train"], "usage: megatron-apt train"),
        (["train", "nowhere.py:run"], "there is no file nowhere.py"),
        (["sample", "nowhere"], "no checkpoint there"),
    ],
)
def test_mistakes_get_one_message(argv, message):
    assert message in fails(argv)


def test_recipe_mistakes_get_one_message(recipe):
    assert "has no function 'walk'" in fails(["train", f"{recipe}:walk"])
    assert "not a RunConfig" in fails(["train", f"{recipe}:wrong"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": -1}, "iterations=-1"),
        ({"global_batch": 0}, "global_batch=0"),
        ({"parallel": ParallelConfig(tp=3)}, r"model\.heads=4 do not split over parallel\.tp=3"),
        (
            {"parallel": ParallelConfig(tp=2, cp=4)},
            r"leaves 2 heads, which do not split over the 4 ranks that trade them",
        ),
    ],
)
def test_configurations_that_cannot_work_name_field_and_remedy(change, message):
    with pytest.raises(ValueError, match=message):
        check_fits(replace(RunConfig(model=MMDiTConfig()), **change))


def test_captions_shorter_than_a_pipelines_are_noticed():
    recipe = load_recipe(f"{Path(__file__).parents[2]}/examples/wan.py:consistency")
    with pytest.warns(UserWarning, match="data.text_length=0: .* pad captions to 512 tokens"):
        check_fits(replace(recipe, data=replace(recipe.data, text_length=0)))
    recipe = load_recipe(f"{Path(__file__).parents[2]}/examples/hunyuan.py:consistency")
    with pytest.warns(
        UserWarning, match="data.text_length=256: .* hide padding from the model; train with 0"
    ):
        check_fits(replace(recipe, data=replace(recipe.data, text_length=256)))


@pytest.mark.dist
def test_torchrun_prints_what_one_process_prints(mesh, tmp_path, datasets, capsys):
    """The command of the README on two tensor-parallel processes, and one process in this."""
    file = tmp_path / "recipe.py"
    here = str(Path(__file__).parents[1])
    file.write_text(
        f"import sys; sys.path.insert(0, {here!r})\nfrom pathlib import Path\n"
        "from megatron_apt.config import OptimizerConfig\nfrom support.runs import config\n"
        f"def run():\n    data, out = Path({str(datasets)!r}), {str(tmp_path / 'out')!r}\n"
        "    return config(data, out, iterations=3, log_every=1, optimizer=OptimizerConfig(lr=1e-5))\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["train", f"{file}:run", "--output"]
    done = subprocess.run(
        [*launcher, "-m", "megatron_apt", *train, str(tmp_path / "two"), "--parallel.tp", "2"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    main([*train, str(tmp_path / "one")])
    one, two = (
        [line.rsplit("  ", 1)[0] for line in said.splitlines() if line.startswith("apt ")]
        for said in (capsys.readouterr().out, done.stdout)
    )
    assert len(one) == 3
    assert one == two


def test_start_up_refuses_a_mesh_that_does_not_fit(mesh):
    from megatron_apt.parallel import startup

    with pytest.raises(ValueError, match="tp=2 x cp=1 x pp=1 = 2 ranks do not divide the 1 processes"):
        startup.start(ParallelConfig(tp=2))
    with pytest.raises(ValueError, match=r"parallel\.tp=0"):
        ParallelConfig(tp=0)


def test_placement_reads_torchrun_and_srun(monkeypatch):
    from megatron_apt.parallel.startup import placement

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")  # a batch script, not a step
    assert placement() == (0, 1, 0)
    for name, value in (
        ("SLURM_STEP_ID", "0"),
        ("SLURM_STEP_NUM_TASKS", "16"),
        ("SLURM_PROCID", "9"),
        ("SLURM_LOCALID", "1"),
    ):
        monkeypatch.setenv(name, value)
    assert placement() == (9, 16, 1)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    assert placement() == (3, 4, 3)


def test_weights_and_biases_is_asked_for_by_name(mesh, datasets, tmp_path):
    with pytest.raises(ImportError, match=r"wandb='project'.*not installed"):
        train(config(datasets, tmp_path, "flow", wandb="project", iterations=1), mesh)
