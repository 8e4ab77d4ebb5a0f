"""Faults of checkpoints: a lost `latest`, lists that lie, states of the wrong types,
kills between two steps, full disks.
"""

import json
import os
import random
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_apt.checkpoint import command as commands
from megatron_apt.checkpoint import save as saving
from megatron_apt.checkpoint import store
from megatron_apt.checkpoint.command import Reshard, Verify, run
from megatron_apt.config import ParallelConfig, RetentionConfig
from megatron_apt.lock import FolderInUse, FolderLock
from megatron_apt.parallel import startup
from megatron_apt.sample.command import load_generator
from megatron_apt.training.train import Trainer, train
from support.planted import as_before_the_index, committed_again
from support.runs import config


@pytest.fixture(scope="module")
def trained(mesh, datasets, tmp_path_factory):
    """A run with commits 1 and 2."""
    run_config = config(
        datasets,
        tmp_path_factory.mktemp("faults") / "run",
        "flow",
        iterations=2,
        save_every=1,
        retention=RetentionConfig(last=0),
    )
    train(run_config, mesh)
    return run_config


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained.output, tmp_path / "run")
    return replace(trained, output=str(tmp_path / "run"))


def lost(pointer: Path) -> dict:
    return {
        "missing": lambda: None,
        "folder": pointer.mkdir,
        "dangling link": lambda: pointer.symlink_to("nowhere"),
        "pipe": lambda: os.mkfifo(pointer),
        "empty": pointer.touch,
        "garbage": lambda: pointer.write_bytes(b"\xff\xfe\x00"),
        "a NUL": lambda: pointer.write_bytes(b"iteration-00000001\0"),
        "long": lambda: pointer.write_text("x" * 100_000),
        "elsewhere": lambda: pointer.write_text("../../etc"),
        "absolute": lambda: pointer.write_text("/etc"),
        "gone": lambda: pointer.write_text("iteration-00000099"),
        "unfinished": lambda: pointer.write_text(".iteration-00000002.tmp"),
    }


@pytest.mark.parametrize("how", lost(Path("x")))
def test_a_lost_pointer_does_not_lose_the_run(mesh, copied, how):
    root = Path(copied.output) / "checkpoints"
    pointer = root / "latest"
    pointer.unlink()
    lost(pointer)[how]()
    for name in (
        "iteration-x",
        "iteration-99999999999999999999",
        "iteration-00000009",
        "iteration-00000008-copy",
    ):
        (root / name).mkdir()
    with pytest.warns(UserWarning, match="going on from iteration-00000002, the newest whole checkpoint"):
        assert store.latest(copied.output).name == "iteration-00000002"
    (root / "iteration-00000002" / "index.json").unlink()
    with pytest.warns(UserWarning, match="going on from iteration-00000001"):
        assert store.latest(copied.output).name == "iteration-00000001"
    if how in ("missing", "folder"):
        with pytest.warns(UserWarning, match="going on from iteration-00000001"):
            assert Trainer(copied, mesh).iteration == 1
    (root / "iteration-00000001" / "state.json").unlink()
    with pytest.raises(
        store.CheckpointError, match=r"latest: .*no checkpoint beside it is whole: .*iteration-00000009"
    ):
        store.latest(copied.output)


def test_a_pointer_to_an_older_commit_is_followed_and_removes_nothing_newer(mesh, copied):
    (Path(copied.output) / "checkpoints" / "latest").write_text("iteration-00000001")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert store.latest(copied.output).name == "iteration-00000001"
    kept = saving.superseded(
        Path(copied.output) / "checkpoints", "iteration-00000001", RetentionConfig(last=1)
    )
    assert kept == []


def test_every_changed_bit_of_a_commit_is_seen(copied):
    folder, rng = store.latest(copied.output), random.Random(0)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for place in {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(6))}:
            changed = bytearray(whole)
            changed[place] ^= 1 << rng.randrange(8)
            file.write_bytes(changed)
            assert store.damages(folder), (file.name, place)
        file.write_bytes(whole)
    assert store.damages(folder) == []


@pytest.mark.parametrize("kind", ["new", "old"])
def test_a_list_that_lies_is_seen(copied, tmp_path, kind, capsys):
    folder = store.latest(copied.output)
    if kind == "old":
        folder = as_before_the_index(folder, tmp_path / "old" / folder.name)
    assert run(Verify(str(folder))) == 0
    assert ("is not sealed" in capsys.readouterr().out) == (kind == "old")
    sums = folder / store.SUMS
    text = sums.read_text()
    listed = json.loads(text)
    flipped = folder / "__0_0.distcp"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x01")
    for content in (
        {},
        {name: entry for name, entry in listed.items() if not name.endswith(".distcp")},
        {"state.json": listed["state.json"]},
        [],
        None,
        {**listed, "../x": listed["state.json"]},
        {**listed, "/etc/passwd": listed["state.json"]},
        {**listed, "state.json": 7},
        {**listed, "state.json": {"bytes": -1, "sha256": "0" * 64}},
        {**listed, "state.json": {"bytes": float("nan"), "sha256": "0" * 64}},
        {**listed, "state.json": {"bytes": 1, "sha256": "xyz"}},
    ):
        sums.write_text(json.dumps(content))
        found = store.damages(folder)
        assert found and all(str(folder) in line for line in found), content
    sums.write_text(text)
    committed_again(folder)
    assert store.damages(folder) == []
    (folder / "more.distcp").touch()
    assert any("more.distcp: is not in checksums.json" in line for line in store.damages(folder))
    (folder / "more.distcp").unlink()
    (folder / "empty").mkdir()
    assert any("empty: is not in checksums.json" in line for line in store.damages(folder))


WRONG = [
    (("iteration",), 1e18, "iteration"),
    (("iteration",), -1, "iteration"),
    (("iteration",), 7, "iteration: is 7 in a folder iteration-00000002"),
    (("iteration",), True, "iteration"),
    (("updates",), [], "updates"),
    (("updates", "generator"), float("nan"), "updates"),
    (("updates", "generator"), "3", "updates"),
    (("sources",), {"generator": 1}, "sources"),
    (("ema",), "yes", "ema"),
    (("samples_seen",), None, "samples_seen"),
    (("values",), {"loss": "low"}, "values"),
    (("format",), 3, "is not of format 2"),
    (("config",), [], "config"),
    (("config", "model"), None, r"config\.model"),
    (("config", "model"), -1, r"config\.model"),
    (("config", "model", "fp8"), [], r"config\.model\.fp8"),
    (("updates",), 1e9, "updates"),
    (("sources",), {"generator": "\ud800"}, "surrogates not allowed"),
    (("config", "model", "depth"), "x", r"config\.model\.depth"),
    (("config", "model", "depth"), 1e400, r"config\.model\.depth"),
    (("config", "model", "depth"), 10**9, r"config\.model.*depth"),
    (("config", "model", "colour"), 1, "unknown fields"),
    (("config", "parallel", "tp"), 0, r"config\.parallel.*parallel\.tp"),
    (("config", "data", "shards"), "a", r"config\.data\.shards"),
    (("config", "optimizer", "betas"), [0.9], r"config\.optimizer\.betas"),
    (("config", "method"), "gan", r"config\.method"),
]


@pytest.mark.parametrize(("place", "value", "message"), WRONG)
def test_a_state_of_wrong_types_names_the_field(trained, tmp_path, place, value, message):
    state = json.loads((store.latest(trained.output) / "state.json").read_text())
    folder = tmp_path / store.latest(trained.output).name
    folder.mkdir()
    inside = state
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(store.CheckpointError, match=rf"state\.json: .*{message}|state\.json: {message}"):
        store.read_state(folder)


@pytest.mark.parametrize(
    ("field", "value"), [("depth", 9000), ("width", 999_936), ("text_width", 999_999), ("latent_channels", 8)]
)
def test_a_model_that_the_files_do_not_hold_is_not_built(mesh, copied, field, value):
    folder = store.latest(copied.output)
    state = json.loads((folder / "state.json").read_text())
    state["config"]["model"][field] = value
    (folder / "state.json").write_text(json.dumps(state))
    committed_again(folder)
    with pytest.raises(store.CheckpointError, match=r"state\.json: config\.model: has .* and the files hold"):
        load_generator(str(folder), mesh)


def test_an_older_state_that_cannot_be_read_does_not_end_a_save(mesh, copied):
    root = Path(copied.output) / "checkpoints"
    (root / "iteration-00000001" / "state.json").write_text("{")
    retention = RetentionConfig(last=1, best="loss")
    with pytest.warns(UserWarning, match=r"iteration-00000001/state\.json: not JSON .*stays where it is"):
        train(replace(copied, iterations=3, retention=retention), mesh)
    assert {path.name for path in root.glob("iteration-*")} >= {"iteration-00000001", "iteration-00000003"}


@pytest.mark.parametrize("code", [28, 30, 122])
def test_a_disk_that_takes_nothing_when_a_save_begins(mesh, copied, monkeypatch, code):
    make = Path.mkdir

    def failing(path, *arguments, **options):
        if path.name == ".iteration-00000003.tmp":
            raise OSError(code, os.strerror(code))
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", failing)
    with pytest.raises(
        store.CheckpointError,
        match=rf"\.iteration-00000003\.tmp: could not be written .*{os.strerror(code)}.*Free disk space",
    ):
        train(replace(copied, iterations=3), mesh)
    assert (
        store.damages(store.latest(copied.output)) == []
        and store.latest(copied.output).name == "iteration-00000002"
    )


# --- the same checkpoint written again


@pytest.fixture
def reshard(monkeypatch):
    monkeypatch.setattr(startup, "stop", lambda: None)  # the processes of the tests go on
    return lambda source, target: commands.reshard(Reshard(str(source), str(target), ParallelConfig()))


def test_resharding_is_repeatable_to_the_byte(copied, tmp_path, reshard):
    for name in ("a", "b"):
        reshard(copied.output, tmp_path / name)
    a, b = (store.latest(tmp_path / name) for name in ("a", "b"))
    files = {file.name for file in a.iterdir()}
    assert files == {file.name for file in b.iterdir()} and ".metadata" in files
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in files)
    source = dict(store.read_tensors(store.latest(copied.output)))
    assert all(torch.equal(tensor, source[key]) for key, tensor in store.read_tensors(a))


def test_resharding_that_was_killed_is_finished(copied, tmp_path, reshard):
    reshard(copied.output, tmp_path / "a")
    root = tmp_path / "a" / "checkpoints"
    with pytest.raises(store.CheckpointError, match="exists already; give another target"):
        reshard(copied.output, tmp_path / "a")
    (root / "latest").unlink()  # killed between its last two steps
    (root / ".iteration-00000002.tmp").mkdir()
    reshard(copied.output, tmp_path / "a")
    assert (root / "latest").read_text() == "iteration-00000002"
    (root / "latest").unlink()
    (root / "iteration-00000002" / "__0_0.distcp").write_bytes(b"half")
    with pytest.raises(store.CheckpointError, match=r"__0_0\.distcp: 4 bytes"):
        reshard(copied.output, tmp_path / "a")


def test_resharding_does_not_meet_another_writer(copied, tmp_path, reshard):
    with (
        FolderLock(tmp_path / "a", "training"),
        pytest.raises(FolderInUse, match=r"a: in use for training by process .*another target folder"),
    ):
        reshard(copied.output, tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == []


def test_resharding_goes_nowhere_it_should_not(copied, tmp_path, reshard):
    folder = store.latest(copied.output)
    (tmp_path / "file").touch()
    for target, message in (
        (copied.output, "is where .* lies"),
        (folder, "is where .* lies"),
        (folder / "inside", "is where .* lies"),
        (tmp_path / "file", "file: is no folder"),
        (tmp_path / "file" / "deeper", "file: is no folder"),
        (tmp_path / ("x" * 5000), "File name too long; give another target folder"),
    ):
        with pytest.raises(store.CheckpointError, match=message):
            reshard(copied.output, target)
    assert store.damages(folder) == []
