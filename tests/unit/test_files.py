"""Files are written whole or not at all."""

import os

import pytest

from megatron_apt import files
from megatron_apt.files import Replacement, write_atomically, write_product


@pytest.mark.parametrize("write", [write_atomically, write_product])
@pytest.mark.parametrize("step", ["replace", "write"])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch, write, step):
    path = tmp_path / "a.json"
    write(path, "old")
    assert path.read_bytes() == b"old"

    def fails(*_):
        raise OSError("no space")

    monkeypatch.setattr(files.os, "replace", fails)
    monkeypatch.setattr(files.Path, "replace", fails)
    if step == "write":
        monkeypatch.setattr(files.Path, "write_bytes", fails)
        monkeypatch.setattr(files.os, "fsync", fails)
    with pytest.raises(OSError, match="no space"):
        write(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_whatever_lies_under_its_temporary_name(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    for plant in (os.mkfifo, lambda place: os.symlink("theirs", place)):
        plant(tmp_path / "latest.tmp")
        write_atomically(tmp_path / "latest", "ours")
        assert (tmp_path / "latest").read_text() == "ours"
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_new_contents_and_then_their_folder_are_on_disk_when_a_commit_ends(tmp_path, monkeypatch):
    steps, fsync, replace = [], os.fsync, files.Path.replace

    def flushed(descriptor):
        steps.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def replaced(old, new):
        steps.append("replace")
        return replace(old, new)

    monkeypatch.setattr(files.os, "fsync", flushed)
    monkeypatch.setattr(files.Path, "replace", replaced)
    write_atomically(tmp_path / "a", "new")
    assert steps == ["a.tmp", "replace", tmp_path.name]


def test_a_replacement_without_commit_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    with Replacement(tmp_path / "a") as new:
        new.stream.write(b"new")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.tmp"]
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_products_folder_is_made(tmp_path):
    write_product(tmp_path / "some" / "where" / "a", "é")
    assert (tmp_path / "some" / "where" / "a").read_bytes() == "é".encode()
