"""Checkpoints: whole or not at all, on any mesh, readable without running anything."""

import json
import os
import pickle
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_apt.checkpoint import save as saving
from megatron_apt.checkpoint import store
from megatron_apt.checkpoint.command import Inspect, Reshard, Verify, inspect, run
from megatron_apt.checkpoint.resume import check_same_run
from megatron_apt.checkpoint.save import superseded
from megatron_apt.checkpoint.state import configuration_of
from megatron_apt.config import GuardConfig, ParallelConfig, RetentionConfig, to_dict
from megatron_apt.errors import Collapse
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.training.train import Trainer, train
from support.problems import model_config
from support.runs import SMOOTH, config, rows, state

F64 = {"model": model_config(dtype="float64", latent_channels=4), "optimizer": SMOOTH}


def test_a_background_save_holds_the_weights_of_its_moment(mesh, datasets, tmp_path, monkeypatch):
    """Training goes on while files are written: the commit has the state from before."""
    go_on, write = threading.Event(), saving._write
    monkeypatch.setattr(saving, "_write", lambda pending: (go_on.wait(60), write(pending)))
    run_config = config(datasets, tmp_path / "run")
    trainer = Trainer(run_config, mesh)
    trainer.step()
    before = state(trainer)
    trainer.save()
    for _ in range(2):
        trainer.step()
    assert trainer.checkpoints.writing
    assert store.latest(run_config.output) is None
    go_on.set()
    folder = trainer.checkpoints.commit()
    assert folder.name == "iteration-00000001"
    stored = dict(store.read_tensors(folder))
    assert stored.keys() == before.keys()
    assert all(torch.equal(stored[key], before[key]) for key in before)
    assert any(not torch.equal(value, before[key]) for key, value in state(trainer).items())


def test_resuming_during_a_save_takes_the_one_before(mesh, datasets, tmp_path):
    trainer = Trainer(config(datasets, tmp_path / "run"), mesh)
    for _ in range(2):
        trainer.step()
        trainer.save()  # the second one commits the first
    assert Trainer(config(datasets, tmp_path / "run"), mesh).iteration == 1
    trainer.checkpoints.commit()
    assert Trainer(config(datasets, tmp_path / "run"), mesh).iteration == 2


def damaged(folder: Path, name: str, how: str) -> Path:
    file = next(iter(sorted(folder.glob(name))))
    content = bytearray(file.read_bytes())
    if how == "bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "short":
        file.write_bytes(content[:-7])
    else:
        file.unlink()
    return file


@pytest.fixture(scope="module")
def flow(mesh, datasets, tmp_path_factory):
    """A run of one iteration with its checkpoint, to be copied."""
    run_config = config(datasets, tmp_path_factory.mktemp("flow"), "flow", iterations=1)
    train(run_config, mesh)
    return run_config


@pytest.mark.parametrize("name", ["*.distcp", "common.pt", "metadata.json", ".metadata", "state.json"])
@pytest.mark.parametrize(
    ("how", "message"),
    [("bit", "bits have changed"), ("short", "were committed; it was cut short"), ("gone", "missing")],
)
def test_a_damaged_file_is_named(mesh, flow, tmp_path, name, how, message):
    run_config = replace(flow, output=str(tmp_path / "run"))
    shutil.copytree(flow.output, run_config.output)
    folder = store.latest(run_config.output)
    assert store.damages(folder) == []
    file = damaged(folder, name, how)
    (found,) = store.damages(folder)
    assert str(file) in found and message in found
    if (name, how) != ("state.json", "gone"):  # without it there is no checkpoint to be found
        assert run(Verify(run_config.output)) == 1
    with pytest.raises(store.CheckpointError, match=file.name.replace(".", r"\.")):
        Trainer(run_config, mesh)


def test_a_failed_write_keeps_what_was_there(mesh, datasets, tmp_path, monkeypatch):
    run_config = config(datasets, tmp_path / "run", "flow", iterations=4, save_every=1)
    train(replace(run_config, iterations=1), mesh)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "checksum", full)
    with pytest.raises(
        store.CheckpointError,
        match=r"\.iteration-00000002\.tmp: could not be written .*No space left on device",
    ):
        train(run_config, mesh)
    monkeypatch.undo()
    assert store.latest(run_config.output).name == "iteration-00000001"
    train(run_config, mesh)
    assert store.latest(run_config.output).name == "iteration-00000004"


def folders(root: Path, values: dict[int, float]) -> Path:
    for iteration, value in values.items():
        folder = root / f"iteration-{iteration:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"format": store.FORMAT, "values": {"g/loss": value}}))
    return root


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (RetentionConfig(last=2), {50, 60}),
        (RetentionConfig(last=0), {10, 20, 30, 40, 50, 60}),
        (RetentionConfig(last=1, every=20), {20, 40, 60}),
        (RetentionConfig(last=1, best="g/loss"), {30, 60}),
        (RetentionConfig(last=1, best="g/loss", best_is="highest"), {10, 60}),
        (RetentionConfig(last=1, every=25, best="g/loss"), {30, 50, 60}),
    ],
)
def test_retention(tmp_path, retention, kept):
    root = folders(tmp_path, {10: 5.0, 20: 3.0, 30: 1.0, 40: 2.0, 50: 4.0, 60: 4.5})
    gone = {int(path.name[-8:]) for path in superseded(root, "iteration-00000060", retention)}
    assert {10, 20, 30, 40, 50, 60} - gone == kept
    if retention.best:
        assert (root / "best").read_text() == f"iteration-{30 if retention.best_is == 'lowest' else 10:08d}"


def test_the_best_checkpoint_stays_and_can_be_resumed_from(mesh, datasets, tmp_path):
    run_config = config(
        datasets,
        tmp_path / "run",
        "flow",
        iterations=4,
        save_every=1,
        retention=RetentionConfig(last=1, best="loss"),
    )
    train(run_config, mesh)
    losses = [row["loss"] for row in rows(run_config.output)]
    best = f"iteration-{losses.index(min(losses)) + 1:08d}"
    root = tmp_path / "run" / "checkpoints"
    assert (root / "best").read_text() == best
    assert {path.name for path in root.glob("iteration-*")} == {best, "iteration-00000004"}
    assert store.read_state(root / best)["values"]["loss"] == min(losses)


def test_inspect_tells_what_is_inside(mesh, datasets, tmp_path):
    run_config = config(datasets, tmp_path / "run", iterations=1)
    train(run_config, mesh)
    text = "\n".join(inspect(Inspect(run_config.output, tensors=True, json=str(tmp_path / "out.json"))))
    assert "method apt, iteration 1, 8 samples seen" in text and "generator.ema.x_embed.weight" in text
    groups = json.loads((tmp_path / "out.json").read_text())["groups"]
    weights = groups["generator weights"]["numbers"]
    assert weights == groups["generator ema"]["numbers"] == groups["generator optimizer.square"]["numbers"]
    assert groups.keys() == {
        *(f"generator {k}" for k in ("weights", "ema", "optimizer.square")),
        "discriminator weights",
        "discriminator optimizer.square",
    }


def test_a_configuration_survives_json(datasets, tmp_path):
    run_config = config(
        datasets, tmp_path, retention=RetentionConfig(last=3, best="g/loss"), parallel=ParallelConfig(tp=2)
    )
    assert configuration_of(json.loads(json.dumps(to_dict(run_config)))) == run_config
    with pytest.raises(store.CheckpointError, match=r"unknown fields \['colour'\]"):
        configuration_of({"colour": 1})


# --- other meshes


def train_on(mesh, run_config):
    train(run_config, mesh)


def state_on(mesh, run_config):
    trainer = Trainer(run_config, mesh)
    return trainer.iteration, {name: network.updates for name, network in trainer.networks.items()}


MESHES = {
    "tp2-dp2": (4, ParallelConfig(tp=2)),
    "cp2-dp2": (4, ParallelConfig(cp=2)),
    "dp2": (2, ParallelConfig()),
    "tp2": (2, ParallelConfig(tp=2)),
    "cp2": (2, ParallelConfig(cp=2)),
    "pp2": (2, ParallelConfig(pp=2)),
    "pp2-tp2": (4, ParallelConfig(pp=2, tp=2)),
    "pp2-dp2": (4, ParallelConfig(pp=2)),
}


@pytest.fixture(scope="module")
def straight(mesh, datasets, tmp_path_factory):
    """Six iterations on one rank, with accumulation and a remainder."""
    run_config = config(
        datasets, tmp_path_factory.mktemp("straight"), iterations=6, global_batch=7, micro_batch=4, **F64
    )
    train(run_config, mesh)
    return run_config


PAIR = ("pp2-tp2", "cp2")  # the others take minutes
FIRST, SECOND = ("tp2-dp2", "cp2-dp2", "pp2-tp2", "pp2-dp2"), ("dp2", "tp2", "cp2", "pp2")
MORE = [pytest.param(a, b, marks=pytest.mark.slow) for a in FIRST for b in SECOND if (a, b) != PAIR]


@pytest.mark.dist
@pytest.mark.parametrize(("before", "after"), [PAIR, *MORE])
def test_any_mesh_continues_what_another_began(ranks, straight, tmp_path, before, after):
    """Six iterations, three on each mesh, equal six on one rank: log, weights, average, both optimisers."""
    base = straight
    broken = replace(base, output=str(tmp_path / "broken"))
    for (world, parallel), iterations in ((MESHES[before], 3), (MESHES[after], 6)):
        ranks(world).run(train_on, parallel, replace(broken, iterations=iterations, parallel=parallel))
    for ours, want in zip(rows(broken.output), rows(base.output), strict=True):
        # Its pairs are neighbours within a microbatch
        shared = {key: value for key, value in want.items() if key != "sample/diversity"}
        assert all(ours[key] == pytest.approx(value, rel=1e-8, abs=1e-10) for key, value in shared.items())
    a, b = (dict(store.read_tensors(store.latest(r.output))) for r in (broken, base))
    assert a.keys() == b.keys()
    for key in a:
        assert torch.allclose(a[key], b[key], rtol=1e-8, atol=1e-10), key


@pytest.mark.dist
@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param(ParallelConfig(), id="dp2", marks=pytest.mark.slow),
        pytest.param(ParallelConfig(cp=2), id="cp2"),
        pytest.param(ParallelConfig(tp=2), id="tp2", marks=pytest.mark.slow),
    ],
)
def test_six_steps_interrupted_equal_six_steps_bit_for_bit_on_the_same_mesh(
    ranks, datasets, tmp_path, parallel
):
    straight = config(
        datasets, tmp_path / "straight", iterations=6, global_batch=7, micro_batch=4, parallel=parallel
    )
    ranks(2).run(train_on, parallel, straight)
    broken = replace(straight, output=str(tmp_path / "broken"))
    for iterations in (2, 6):
        ranks(2).run(train_on, parallel, replace(broken, iterations=iterations))
    assert rows(broken.output) == rows(straight.output)
    a, b = (dict(store.read_tensors(store.latest(r.output))) for r in (broken, straight))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.dist
def test_reshard_keeps_every_bit(ranks, mesh, datasets, tmp_path, monkeypatch):
    run_config = config(datasets, tmp_path / "run", iterations=2, parallel=ParallelConfig(tp=2))
    ranks(4).run(train_on, run_config.parallel, run_config)
    source = store.latest(run_config.output)
    want = dict(store.read_tensors(source))
    for name, parallel in {"cp2": ParallelConfig(cp=2), "pp2": ParallelConfig(pp=2)}.items():
        ranks(2).run(_reshard, parallel, str(source), str(tmp_path / name), parallel)
        folder = store.latest(tmp_path / name)
        got = dict(store.read_tensors(folder))
        assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
        assert store.read_state(folder)["config"]["parallel"][name[:2]] == 2
        assert len(list(source.glob("*.distcp"))) == 4 and len(list(folder.glob("*.distcp"))) == 2
    with pytest.raises(AssertionError, match="exists already"):
        ranks(2).run(_reshard, ParallelConfig(cp=2), str(source), str(tmp_path / "cp2"), ParallelConfig(cp=2))


def _reshard(mesh, source, target, parallel):
    from megatron_apt.checkpoint import command as commands
    from megatron_apt.parallel import startup

    kept, startup.stop = startup.stop, lambda: None  # the pool of test processes goes on
    try:
        commands.reshard(Reshard(source, target, parallel))
    finally:
        startup.stop = kept


def test_an_incomplete_folder_is_cleared_by_the_next_save(mesh, datasets, tmp_path):
    run_config = config(datasets, tmp_path / "run", "flow", iterations=1)
    left = tmp_path / "run" / "checkpoints" / ".iteration-00000007.tmp"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")
    train(run_config, mesh)
    assert not left.exists()


def test_training_that_stops_by_itself_finishes_the_save_under_way(mesh, datasets, tmp_path, monkeypatch):
    go_on, write = threading.Event(), saving._write
    monkeypatch.setattr(saving, "_write", lambda pending: (go_on.wait(60), write(pending)))
    guards = GuardConfig(collapse_window=1, collapse_d_loss=0.0)
    run_config = config(datasets, tmp_path / "run", iterations=9, save_every=2, guards=guards)

    def collapse_after_the_save(iteration, values):
        if iteration >= 3:
            values["d/loss"] = -1.0
            go_on.set()

    with pytest.raises(Collapse):
        train(run_config, mesh, collapse_after_the_save)
    assert store.latest(run_config.output).name == "iteration-00000002"


def test_a_signal_during_an_alarm_keeps_the_good_checkpoint(mesh, datasets, tmp_path):
    guards = GuardConfig(collapse_window=100, collapse_d_loss=0.0)
    run_config = config(
        datasets,
        tmp_path / "run",
        iterations=9,
        save_every=2,
        guards=guards,
        retention=RetentionConfig(last=1),
    )

    def alarm_then_signal(iteration, values):
        if iteration >= 3:
            values["d/loss"] = -1.0
        if iteration == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        train(run_config, mesh, alarm_then_signal)
    assert {path.name for path in (tmp_path / "run" / "checkpoints").glob("iteration-*")} == {
        "iteration-00000002",
        "iteration-00000005",
    }


def test_a_folder_that_cannot_be_made_is_named(mesh, datasets, tmp_path):
    run_config = config(datasets, tmp_path / "run", "flow", iterations=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    with pytest.raises(
        store.CheckpointError, match=r"run/checkpoints: is no folder, so that nothing can be saved there"
    ):
        train(run_config, mesh)


def test_half_a_removed_checkpoint_has_no_checkpoints_name(tmp_path, mesh, datasets, monkeypatch):
    """A kill inside the removal of an old checkpoint leaves nothing that looks like one."""
    run_config = config(
        datasets,
        tmp_path / "run",
        "flow",
        iterations=3,
        save_every=1,
        retention=RetentionConfig(last=1, best="loss"),
    )
    remove, seen = shutil.rmtree, []

    def removed(path, **options):
        if Path(path).exists():
            seen.append(Path(path).name)
        remove(path, **options)

    monkeypatch.setattr(saving.shutil, "rmtree", removed)
    train(run_config, mesh)
    assert seen and all(name.startswith(".iteration-") for name in seen)


def test_a_checkpoint_without_a_younger_field_continues_with_its_default(datasets, tmp_path):
    wanted = to_dict(config(datasets, tmp_path))
    older = json.loads(json.dumps(wanted))
    del older["apt"]["reuse_fakes"], older["pipeline"], older["model"]["rope_theta"]
    check_same_run(older, wanted, tmp_path)
    changed = to_dict(
        config(datasets, tmp_path, apt=AptConfig(ar1_lambda=10.0, ar1_sigma=0.1, reuse_fakes=True))
    )
    with pytest.raises(
        store.CheckpointError, match=r"otherwise: apt\.\S+: \S+ in the checkpoint, \S+ asked for"
    ):
        check_same_run(older, changed, tmp_path)


def test_a_frozen_backbone_comes_back(mesh, datasets, tmp_path):
    """A discriminator's weights that do not train are in its checkpoint, and a resume
    takes them from there.
    """
    run_config = config(datasets, tmp_path / "run", apt=AptConfig(train_backbone=False), iterations=1)
    trainer = Trainer(run_config, mesh)
    weight = trainer.networks["discriminator"].module.backbone.x_embed.weight
    with torch.no_grad():
        weight.normal_()
    trainer.step()
    trainer.save()
    trainer.checkpoints.commit()
    resumed = Trainer(run_config, mesh)
    assert resumed.iteration == 1
    assert torch.equal(resumed.networks["discriminator"].module.backbone.x_embed.weight, weight)


def written_in_chunks(
    folder: Path, chunks: dict[tuple[int, int], torch.Tensor], shape: tuple[int, int]
) -> Path:
    """A folder with torch's index of one tensor `w` whose chunks, given by their place,
    lie one behind the other in one file.
    """
    index = Metadata(
        {"w": TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(shape), [])}, storage_data={}
    )
    folder.mkdir()
    with open(folder / "__0_0.distcp", "wb") as file:
        for offsets, chunk in chunks.items():
            start = file.tell()
            torch.save(chunk.clone(), file)
            index.state_dict_metadata["w"].chunks.append(
                ChunkStorageMetadata(torch.Size(offsets), chunk.shape)
            )
            index.storage_data[MetadataIndex("w", offsets)] = _StorageInfo(
                "__0_0.distcp", start, file.tell() - start
            )
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder


def test_a_tensor_in_chunks_is_read_as_torch_reads_it(tmp_path):
    whole = torch.randn(5, 7)
    places = {(i, j): whole[i : i + 3, j : j + 4] for i in (0, 3) for j in (0, 4)}
    folder = written_in_chunks(tmp_path / "whole", places, (5, 7))
    by_torch = {"w": torch.empty(5, 7)}
    dcp.load(by_torch, storage_reader=FileSystemReader(folder), no_dist=True)
    assert torch.equal(store.Stored(folder).read("w"), whole) and torch.equal(by_torch["w"], whole)
    del places[3, 4]
    with pytest.raises(store.CheckpointError, match=r"'w' is not whole, 29 of 35 numbers are there"):
        store.Stored(written_in_chunks(tmp_path / "part", places, (5, 7))).read("w")
    with pytest.raises(store.CheckpointError, match=r"a chunk of 'w' reaches beyond its shape \(5, 6\)"):
        store.Stored(written_in_chunks(tmp_path / "beyond", {(3, 4): whole[3:, 4:]}, (5, 6))).read("w")
    os.truncate(folder / "__0_0.distcp", 1500)
    with pytest.raises(store.CheckpointError, match=r"__0_0\.distcp: 'w' cannot be read"):
        store.Stored(folder).read("w")


@pytest.mark.parametrize(
    ("module", "name"), [("pathlib", "os.system"), ("torch.distributed.checkpoint.filesystem", "os.remove")]
)
def test_an_index_reaches_nothing_through_the_modules_it_may_name(tmp_path, module, name):
    def word(text):
        return pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()

    (tmp_path / ".metadata").write_bytes(
        pickle.PROTO + b"\x04" + word(module) + word(name) + pickle.STACK_GLOBAL + pickle.STOP
    )
    with pytest.raises(
        store.CheckpointError, match=rf"its index asks for {module}\.{name}, which no checkpoint index needs"
    ):
        store.index(tmp_path)
