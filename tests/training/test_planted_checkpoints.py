"""Nothing of a checkpoint runs, whoever wrote it and whatever reads it; and what was
written before index.json is still read.
"""

import contextlib
import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_apt.checkpoint import store
from megatron_apt.checkpoint.command import Inspect, Verify, inspect, run
from megatron_apt.families.registry import build_backbone
from megatron_apt.training.networks import load_weights
from megatron_apt.training.train import train
from support import planted
from support.planted import as_before_the_index, attacks, bombs, committed_again
from support.problems import model_config
from support.runs import config

MODEL = model_config(latent_channels=4)


@pytest.fixture(scope="module")
def commits(mesh, datasets, tmp_path_factory):
    """One checkpoint as it is written now, and as it was before: {"new": folder, "old": folder}."""
    root = tmp_path_factory.mktemp("planted")
    run_config = config(datasets, root / "run", "flow", iterations=1)
    train(run_config, mesh)
    new = store.latest(run_config.output)
    return {"new": new, "old": as_before_the_index(new, root / "old" / "checkpoints" / new.name)}


@pytest.fixture
def copies(commits, tmp_path):
    return {
        kind: Path(shutil.copytree(folder, tmp_path / kind / folder.name)) for kind, folder in commits.items()
    }


def chosen(canary: Path, kind: str) -> list[tuple[str, bytes]]:
    """Every tenth attack on what is read of an old commit, all of them in `make test-all`; as
    few of a new one, whose pickles nothing but verify looks at.
    """
    return list(attacks(canary).items())[:: {"all": 1, "old": 10, "new": 11}[kind]]


def tried(folder: Path, mesh) -> list[str]:
    """Reads a checkpoint by every way there is; the refusals."""
    model = build_backbone(MODEL, mesh)
    refused = []
    for action in (
        lambda: list(inspect(Inspect(str(folder), tensors=True))),
        lambda: store.verify(folder, mesh),
        lambda: store.load(folder, {}),
        lambda: load_weights(f"{folder}:raw", model, mesh),
        lambda: dict(store.read_tensors(folder)),
    ):
        try:
            action()
        except store.CheckpointError as error:
            refused.append(str(error))
    assert run(Verify(str(folder))) == bool(store.damages(folder))
    return refused


def test_what_was_written_before_the_index_is_read_as_before(mesh, commits):
    new, old = (dict(store.read_tensors(folder)) for folder in commits.values())
    assert new.keys() == old.keys() and all(torch.equal(new[key], old[key]) for key in new)
    assert not (commits["old"] / "index.json").exists() and store.damages(commits["old"]) == []
    loaded = [build_backbone(MODEL, mesh) for _ in commits]
    for model, folder in zip(loaded, commits.values(), strict=True):
        load_weights(f"{folder}:raw", model, mesh)
    for (key, a), (_, b) in zip(loaded[0].named_parameters(), loaded[1].named_parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, new[f"generator.{key}"]), key


def test_the_attacks_would_run_elsewhere(tmp_path):
    """Or this file would prove nothing."""
    for trick in (
        "reduce",
        "stack_global",
        "dotted",
        "attrgetter",
        "eval",
        "exec",
        "posix",
        "inst",
        "obj",
        "build",
        "twice",
    ):
        canary = tmp_path / trick
        with contextlib.suppress(Exception):
            pickle.loads(attacks(canary)[trick])
        assert canary.exists(), trick


ALL = pytest.param("all", marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", ["old", "new", ALL])
def test_no_index_runs_code(mesh, copies, tmp_path, kind):
    folder = copies["new" if kind == "new" else "old"]
    for trick, data in chosen(tmp_path / "canary", kind):
        (folder / ".metadata").write_bytes(data)
        committed_again(folder)
        refused = tried(folder, mesh)
        # With an index of ours nothing but verify reads torch's
        assert len(refused) == (2 if kind == "new" else 5), (trick, refused)
        assert all(".metadata: " in text and "do not load this checkpoint" in text for text in refused), (
            trick,
            refused,
        )
        assert not (tmp_path / "canary").exists() and folder.parent.is_dir(), trick


@pytest.mark.parametrize("kind", ["old", "new", ALL])
def test_no_record_runs_code(mesh, copies, tmp_path, kind):
    """Nor does the pickle inside the files of tensors, where a new index says the place
    of the numbers and an old one does not.
    """
    folder = copies["new" if kind == "new" else "old"]
    for trick, data in chosen(tmp_path / "canary", kind):
        plant_in_first_record(folder, data)
        refused = tried(folder, mesh)
        assert not (tmp_path / "canary").exists(), trick
        assert (len(refused) >= 1) == (kind != "new"), (trick, refused)


def plant_in_first_record(folder: Path, data: bytes) -> None:
    """Puts a pickle where the first record of a file has its own, at its length or as the whole record."""
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    start = content.index(b"\x80\x02ctorch._utils")
    end = content.index(b"PK", start)
    content[start:end] = data[: end - start].ljust(end - start, b".")
    file.write_bytes(content)
    committed_again(folder)


@pytest.mark.parametrize("kind", ["old", "new"])
def test_what_is_common_to_ranks_runs_no_code(mesh, copies, tmp_path, kind):
    folder = copies[kind]
    for trick, data in chosen(tmp_path / "canary", "new"):
        for content in (data, zipped(data)):
            (folder / "common.pt").write_bytes(content)
            committed_again(folder)
            refused = tried(folder, mesh)
            assert not (tmp_path / "canary").exists(), trick
            assert len(refused) == 2 and all("common.pt: " in text for text in refused), (trick, refused)


def zipped(data: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for member, content in {
            "data.pkl": data,
            "byteorder": b"little",
            "data/0": bytes(64),
            "version": b"3\n",
        }.items():
            archive.writestr(f"archive/{member}", content)
    return buffer.getvalue()


def test_no_attack_on_an_index_gets_through(copies, tmp_path):
    for trick, data in chosen(tmp_path / "canary", "all"):
        (copies["old"] / ".metadata").write_bytes(data)
        with pytest.raises(store.CheckpointError, match=r"\.metadata: .*do not load this checkpoint"):
            store.Stored(copies["old"])
        assert not (tmp_path / "canary").exists(), trick


def test_bombs_are_refused(mesh, copies):
    folder = copies["old"]
    for data in bombs().values():
        (folder / ".metadata").write_bytes(data)
        with pytest.raises(store.CheckpointError, match=r"\.metadata: "):
            store.Stored(folder)
    committed_again(folder)
    refused = tried(folder, mesh)
    assert len(refused) == 5 and all(".metadata: " in text for text in refused)


def index_of(folder: Path, **changes) -> Metadata:
    """torch's index of one tensor `w` of 2 x 3 numbers, with parts of it changed."""
    fields = {
        "size": torch.Size((2, 3)),
        "properties": TensorProperties(torch.float32),
        "offsets": torch.Size((0, 0)),
        "sizes": torch.Size((2, 3)),
        "path": "__0_0.distcp",
        "start": 0,
        "length": os.path.getsize(folder / "__0_0.distcp"),
        "key": "w",
    } | changes
    tensor = TensorStorageMetadata(
        fields["properties"], fields["size"], [ChunkStorageMetadata(fields["offsets"], fields["sizes"])]
    )
    place = _StorageInfo(fields["path"], fields["start"], fields["length"], fields.get("transforms"))
    return Metadata({fields["key"]: tensor}, storage_data={MetadataIndex("w", (0, 0)): place})


WRONG = {
    "class for a dtype": {"properties": TensorProperties(ChunkStorageMetadata)},
    "class for properties": {"properties": TensorProperties},
    "list for a size": {"size": [2, 3]},
    "class for a size": {"size": torch.Size},
    "text for offsets": {"offsets": "00"},
    "negative size": {"size": (-2, -3)},
    "class for sizes": {"sizes": _StorageInfo},
    "number for a name": {"key": 7},
    "huge": {"size": torch.Size((2**40, 2**40)), "sizes": torch.Size((2**40, 2**40))},
    "wide": {"size": torch.Size((2, 4))},
    "deep": {"size": torch.Size((2, 3, 1)), "sizes": torch.Size((2, 3, 1))},
    "another file": {"path": "../canary"},
    "an absolute file": {"path": "/etc/passwd"},
    "no file": {"path": ""},
    "the folder": {"path": "."},
    "a class for a file": {"path": TensorProperties},
    "text for a place": {"start": "0"},
    "a place behind the end": {"start": 2**40},
    "a length behind the end": {"length": 2**52},
    "a negative place": {"start": -1},
    "true for a place": {"start": True},
    "compressed": {"transforms": ["zstd"]},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_index_of_the_right_classes_in_the_wrong_places_is_refused(tmp_path, wrong):
    folder = tmp_path / "commit"
    folder.mkdir()
    whole = torch.arange(6.0).reshape(2, 3)
    torch.save(whole, folder / "__0_0.distcp")
    (tmp_path / "canary").write_bytes((folder / "__0_0.distcp").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(index_of(folder)))
    assert torch.equal(store.Stored(folder).read("w"), whole)
    (folder / ".metadata").write_bytes(pickle.dumps(index_of(folder, **WRONG[wrong])))
    with pytest.raises(store.CheckpointError, match=r"commit/(\.metadata|__0_0\.distcp): "):
        store.Stored(folder)


def test_a_record_that_claims_more_than_it_holds_is_refused(tmp_path):
    folder = tmp_path / "commit"
    folder.mkdir()
    file = folder / "__0_0.distcp"

    def record(data: bytes, **options) -> None:
        file.write_bytes(zipped(data, **options))
        (folder / ".metadata").write_bytes(pickle.dumps(index_of(folder)))

    def tensor(
        shape=b"K\x02K\x03\x86",
        strides=b"K\x03K\x01\x86",
        offset=b"K\x00",
        storage=b"FloatStorage",
        numbers=b"K\x10",
        key=b"X\x01\x00\x00\x000",
    ):
        place = b"(X\x07\x00\x00\x00storagectorch\n" + storage + b"\n" + key + b"X\x03\x00\x00\x00cpuK\x10tQ"
        return (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
            + place
            + offset
            + shape
            + strides
            + b"\x89ccollections\nOrderedDict\n)RtR."
        )

    record(tensor())
    assert torch.equal(store.Stored(folder).read("w"), torch.zeros(2, 3))
    for data, message in (
        (tensor(shape=b"K\x02J\xff\xff\xff\x7f\x86"), "does not lie in its 64 bytes"),
        (tensor(strides=b"K\x00K\x00\x86", shape=b"M\xff\xffM\xff\xff\x86"), "does not lie in its 64 bytes"),
        (tensor(strides=b"K\xffK\x01\x86"), "does not lie in its 64 bytes"),
        (tensor(offset=b"K\x0c"), "does not lie in its 64 bytes"),
        (tensor(offset=b"J\xff\xff\xff\xff"), "whole numbers belong"),
        (tensor(storage=b"DoubleStorage"), r"it holds float64 of shape \(2, 3\), not float32"),
        (tensor(storage=b"device"), "its record asks for torch.device"),
        (tensor(key=b"X\x01\x00\x00\x001"), "refers to what is not in it"),
        (tensor(shape=b"K\x03K\x02\x86"), r"it holds float32 of shape \(3, 2\)"),
        (b"\x80\x02ctorch\nFloatStorage\n.", "where a torch._utils._rebuild_tensor_v2 belongs"),
    ):
        record(data)
        with pytest.raises(store.CheckpointError, match=rf"__0_0\.distcp: 'w' cannot be read \(.*{message}"):
            store.Stored(folder).read("w")
    record(tensor(), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(store.CheckpointError, match="compressed"):
        store.Stored(folder).read("w")
    record(tensor() + bytes(2**17))
    with pytest.raises(store.CheckpointError, match="longer than it can be"):
        store.Stored(folder).read("w")


def test_a_view_is_read_as_torch_saved_it(tmp_path):
    """Older imports wrote views as they were: turned, or with the storage that they are a part of."""
    base = torch.randn(7, 5)
    for number, view in enumerate((base.T[1:3, 2:5], base[::2, ::3][:2].expand(2, 2)[:, :2], base[2:4, 1:4])):
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.save(view, folder / "__0_0.distcp")
        size = view.shape
        (folder / ".metadata").write_bytes(pickle.dumps(index_of(folder, size=size, sizes=size)))
        assert torch.equal(store.Stored(folder).read("w"), view)
        room = torch.empty(1, size[1], dtype=torch.float64)
        assert torch.equal(store.Stored(folder).fill("w", room, (1, 0)), view[1:].double())


def test_a_file_in_the_way_is_no_file_of_a_checkpoint(copies):
    """A link, a pipe, a folder: named, and never waited for."""
    folder = copies["new"]
    for file in ("__0_0.distcp", "index.json", "checksums.json", "commit.json", "state.json"):
        kept = (folder / file).read_bytes()
        for put in (lambda path: path.symlink_to("/etc/passwd"), os.mkfifo, os.mkdir):
            (folder / file).unlink()
            put(folder / file)
            assert any(file in line for line in store.damages(folder)), file
            if file == "__0_0.distcp":
                with pytest.raises(store.CheckpointError, match=file):
                    store.Stored(folder)
            (os.rmdir if (folder / file).is_dir() else os.unlink)(folder / file)
            (folder / file).write_bytes(kept)
    assert store.damages(folder) == []


def test_planted_helpers_commit_what_verifies(copies):
    for folder in copies.values():
        planted.committed_again(folder)
        assert store.damages(folder) == []
