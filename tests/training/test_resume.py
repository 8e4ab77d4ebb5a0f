"""What a run finds in its output folder: its log, its commits, data under other names."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_apt.checkpoint import resume, store
from megatron_apt.checkpoint.files import point
from megatron_apt.checkpoint.resume import begin, check_same_run
from megatron_apt.checkpoint.state import model_of
from megatron_apt.checkpoint.store import CheckpointError
from megatron_apt.config import RunConfig, to_dict
from megatron_apt.data.identity import identify
from megatron_apt.data.shards import LatentShards
from megatron_apt.families.mmdit.config import MMDiTConfig
from megatron_apt.families.registry import to_stored
from megatron_apt.families.sd3.config import Sd3Config
from megatron_apt.families.wan.config import WanConfig
from megatron_apt.training.log import LogError, RunLog, read_rows
from megatron_apt.training.train import train
from support.runs import config, rows


def opened(folder, start: int) -> None:
    RunLog(RunConfig(output=str(folder), tensorboard=False), start).close()


def test_rows_after_the_checkpoint_and_lines_that_are_none_are_kept_beside(tmp_path):
    lines = [
        b'{"iteration": 1, "loss": 2.0}\n',
        b'{"iteration": 2, "loss": NaN}\n',
        b"\xff\xfe\n",
        b"[" * 9000 + b"\n",
        b'{"iteration": 1e400}\n',
    ]
    lines += [b'{"iteration": "3"}\n', b"\n", b'{"iteration": 3, "loss": 1.0}\n', b'{"iteration": 4, "lo']
    (tmp_path / "log.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "log.discarded.jsonl").write_bytes(b"before\n")
    with pytest.warns(UserWarning, match=r"log\.jsonl:3: not a row of a log; 6 such lines"):
        assert [row["iteration"] for row in read_rows(tmp_path / "log.jsonl")] == [1, 2, 3]
    opened(tmp_path, start=2)
    assert (tmp_path / "log.jsonl").read_bytes() == b"".join(lines[:2])
    assert (tmp_path / "log.discarded.jsonl").read_bytes() == b"before\n" + b"".join(lines[2:]) + b"\n"
    opened(tmp_path, start=2)
    assert sorted(os.listdir(tmp_path)) == ["log.discarded.jsonl", "log.jsonl"]


PLANTS = {
    "folder": os.mkdir,
    "pipe": os.mkfifo,
    "device": lambda place: os.symlink("/dev/zero", place),
    "full device": lambda place: os.symlink("/dev/full", place),
    "circle": lambda place: os.symlink(place, place),
    "holes": lambda place: open(place, "wb").truncate(1 << 33),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_log_that_is_none_is_refused_by_name(tmp_path, plant):
    PLANTS[plant](tmp_path / "log.jsonl")
    with pytest.raises(
        LogError, match=r"log\.jsonl: (is no plain file; move|has a line of .* move|cannot be written)"
    ):
        opened(tmp_path, start=0)
    with pytest.raises(
        LogError, match=r"log\.jsonl: (is no plain file; move|has a line of .* move|cannot be read)"
    ):
        read_rows(tmp_path / "log.jsonl")


@pytest.mark.parametrize("name", ["log.discarded.jsonl", "log.jsonl.tmp"])
def test_pipes_and_links_under_the_names_beside_it_are_not_followed(tmp_path, name):
    (tmp_path / "log.jsonl").write_text("no row\n")
    (tmp_path / "theirs").write_text("")
    os.mkfifo(tmp_path / name) if name == "log.discarded.jsonl" else os.symlink("theirs", tmp_path / name)
    if name == "log.discarded.jsonl":
        with pytest.raises(LogError, match="cannot be written"):
            opened(tmp_path, start=0)
        assert (tmp_path / "log.jsonl").read_text() == "no row\n"
    else:
        opened(tmp_path, start=0)
    assert (tmp_path / "theirs").read_text() == ""


@pytest.fixture(scope="module")
def short(mesh, datasets, tmp_path_factory):
    """A run of three iterations, each with a checkpoint."""
    folder = tmp_path_factory.mktemp("short") / "run"
    train(config(datasets, folder, "flow", iterations=3, save_every=1), mesh)
    return folder


def test_a_run_that_lost_its_commits_begins_only_afresh_and_keeps_what_was(mesh, datasets, short, tmp_path):
    run = config(datasets, shutil.copytree(short, tmp_path / "run"), "flow", iterations=1)
    for folder in (tmp_path / "run" / "checkpoints").glob("iteration-*"):
        (folder / "state.json").unlink()
    before = rows(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"state\.json: missing.*point `latest` at another"):
        train(replace(run, fresh=True), mesh)
    (tmp_path / "run" / "checkpoints" / "latest").unlink()
    with pytest.raises(CheckpointError, match=r"latest: is missing, and no checkpoint beside it is whole"):
        train(run, mesh)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"a run was here \(log\.jsonl, summary\.json\).*--fresh"):
        train(run, mesh)
    (tmp_path / "run" / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoints: is no folder"):
        train(run, mesh)
    assert rows(tmp_path / "run") == before
    (tmp_path / "run" / "checkpoints").unlink()
    train(replace(run, fresh=True), mesh)
    assert [row["iteration"] for row in rows(tmp_path / "run")] == [1]
    assert len((tmp_path / "run" / "log.discarded.jsonl").read_text().splitlines()) == len(before) == 3
    train(run, mesh)  # the next start needs no flag
    assert store.latest(run.output).name == "iteration-00000001"


def test_afresh_beside_damaged_commits_sets_them_aside(short, tmp_path):
    run = shutil.copytree(short, tmp_path / "run")
    for folder in (run / "checkpoints").glob("iteration-*"):
        (folder / "state.json").write_text("{")
    (run / "checkpoints" / "latest").unlink()
    begin(RunConfig(output=str(run), fresh=True))
    assert sorted(os.listdir(run / "checkpoints-before-0")) == sorted(
        {*os.listdir(short / "checkpoints")} - {"latest"}
    )
    assert not (run / "checkpoints").exists()


def test_a_lost_latest_is_found_again(short, tmp_path):
    run = shutil.copytree(short, tmp_path / "run")
    for plant in (
        lambda place: None,
        os.mkfifo,
        os.mkdir,
        lambda place: os.symlink("gone", place),
        lambda place: os.symlink("/dev/zero", place),
    ):
        pointer = run / "checkpoints" / "latest"
        pointer.rmdir() if pointer.is_dir() else pointer.unlink(missing_ok=True)
        plant(pointer)
        with pytest.warns(UserWarning, match="going on from iteration-00000003"):
            begin(RunConfig(output=str(run)))
    assert not (run / resume._UNCOMMITTED).exists()


def test_a_folder_called_latest_is_kept_beside(tmp_path):
    (tmp_path / "latest" / "inside").mkdir(parents=True)
    point(tmp_path, "iteration-00000003")
    assert (tmp_path / "latest").read_text() == "iteration-00000003"
    (aside,) = tmp_path.glob("latest.*")
    assert os.listdir(aside) == ["inside"]
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to(aside)
    point(tmp_path, "iteration-00000004")
    assert (tmp_path / "latest").read_text() == "iteration-00000004" and os.listdir(aside) == ["inside"]


def test_the_same_data_goes_on_under_another_path_and_other_data_under_the_same_is_named(
    mesh, datasets, short, tmp_path
):
    state = store.read_state(store.latest(short))
    assert [dataset["digest"] for dataset in state["data"]] == [
        identify(LatentShards(datasets / name)).digest for name in ("images", "videos")
    ]
    moved = shutil.copytree(datasets, tmp_path / "moved")
    run = config(moved, shutil.copytree(short, tmp_path / "run"), "flow", iterations=4)
    train(run, mesh)
    assert [row["iteration"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]
    index = moved / "images" / "index.jsonl"
    lines = index.read_text(encoding="utf-8").splitlines(keepends=True)
    first = json.loads(lines[0])
    index.write_text(json.dumps(first | {"caption": "another"}) + "\n" + "".join(lines[1:]), encoding="utf-8")
    about = json.loads((moved / "images" / "dataset.json").read_text())
    (moved / "images" / "dataset.json").write_text(
        json.dumps({name: value for name, value in about.items() if name != "index_sha256"})
    )
    with pytest.raises(
        CheckpointError,
        match=r"data\.shards\[0\]: .*moved/images holds other data "
        ".*than the dataset the checkpoint was trained on",
    ):
        train(replace(run, iterations=5), mesh)


def test_differences_are_shown_short(tmp_path):
    wanted = json.loads(json.dumps(to_dict(RunConfig(model=MMDiTConfig()))))
    heads = {"head_layers": [1 / 3] * 100_000}
    changed = {name: value + 1 for name, value in wanted["apt"].items() if type(value) is float and value > 0}
    del changed["discriminator_depth"], changed["two_step_t"]  # at most 1
    flow = {name: value / 2 for name, value in wanted["flow"].items() if value}
    consistency = {name: value / 2 for name, value in wanted["consistency"].items()} | {"steps": 7}
    stored = wanted | {"seed": 1, "global_batch": 7, "flow": wanted["flow"] | flow}
    stored |= {"consistency": consistency, "apt": wanted["apt"] | changed | heads}
    with pytest.raises(
        CheckpointError,
        match=r"apt.head_layers: \[0.3.*\(2000000 characters\) in the checkpoint.*and \d+ more",
    ) as refused:
        check_same_run(stored, wanted, tmp_path)
    assert len(str(refused.value)) < 5000


def test_a_second_interrupt_ends_at_once():
    # The second SIGINT comes at once, as torchrun repeats what the terminal sent
    code = """
import os, signal, time
from megatron_apt.training import guards
guards._ONE_PRESS = 0.1
with guards.Signals() as signals:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print(signals.received, flush=True)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGINT)
    print('still here')
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (130, f"{signal.SIGINT.value}\n")
    assert done.stderr.count("saving after this iteration; Ctrl-C again ends at once") == 1


# --- shapes as they were stored before families had fields of their own

OLD_SECTIONS = {
    "wan": {"cross_norm": True, "image_width": 0, "image_tokens": 257, "first_frame": True},
    "sd3": {
        "pooled_width": 2048,
        "position_size": 192,
        "sample_size": 128,
        "qk_norm": False,
        "dual_layers": [],
    },
    "flux": {"double_blocks": 19, "pooled_width": 768, "rope_axes": [16, 56, 56], "guidance": 3.5},
    "hunyuan": {
        "double_blocks": 20,
        "pooled_width": 768,
        "rope_axes": [16, 56, 56],
        "guidance": 6.0,
        "refiner_blocks": 2,
    },
}
COMMON = {"depth": 4, "width": 48, "heads": 4, "last_block_text": False, "patch": [1, 2, 2]}


@pytest.mark.parametrize(
    ("stored", "shape"),
    [
        (
            {"family": "mmdit", "modulation": "single", "pooled_text": True},
            MMDiTConfig(depth=4, width=48, modulation="single"),
        ),
        (
            {"family": "wan", "modulation": "single", "pooled_text": False},
            WanConfig(depth=4, width=48, first_frame=True),
        ),
        (
            {"family": "sd3", "modulation": "block", "pooled_text": True},
            Sd3Config(depth=4, width=48),
        ),
    ],
    ids=lambda value: value["family"] if isinstance(value, dict) else "",
)
def test_a_shape_of_an_older_version_is_read(stored, shape):
    found = model_of({**COMMON, **stored, **OLD_SECTIONS})
    assert found == shape and type(found) is type(shape)
    assert model_of(json.loads(json.dumps(to_stored(shape)))) == shape


def test_a_shape_with_what_its_family_cannot_have_is_not_read():
    with pytest.raises(CheckpointError, match=r"unknown fields \['modulation'\]"):
        model_of({**COMMON, **OLD_SECTIONS, "family": "wan", "modulation": "block"})
    with pytest.raises(CheckpointError, match="family='dit': use 'mmdit', 'wan'"):
        model_of({"family": "dit"})
