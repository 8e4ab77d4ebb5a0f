"""The lock on a folder: one holder, a dead one told from a live one here and on other
machines, a lost one noticed.
"""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from megatron_apt import lock
from megatron_apt.config import ParallelConfig
from megatron_apt.lock import FolderInUse, FolderLock, LockLost


def quick(folder, **options) -> FolderLock:
    return FolderLock(folder, "training", interval=0.05, patience=0.4, **options)


def foreign(folder, **changes) -> lock.Holder:
    """Writes the `.lock` of a holder on another machine."""
    fields = {
        "token": "theirs",
        "host": "node7",
        "pid": 4711,
        "boot": "another kernel",
        "interval": 0.05,
    } | changes
    holder = replace(lock._me("training", 0.05), **fields)
    folder.mkdir(exist_ok=True)
    (folder / lock.NAME).write_text(json.dumps(vars(holder)))
    return holder


def test_a_second_holder_is_refused_by_name_and_leaves_nothing(tmp_path):
    with quick(tmp_path / "run"):
        with (
            pytest.raises(
                FolderInUse,
                match=rf"training by process {os.getpid()} of .* on .*, since 20.*another output folder",
            ),
            quick(tmp_path / "run"),
        ):
            pytest.fail("entered")
        assert os.listdir(tmp_path / "run") == [lock.NAME]
    assert os.listdir(tmp_path / "run") == []
    with quick(tmp_path / "run"):
        pass


def test_many_at_once_one_gets_it(tmp_path):
    for turn in range(20):
        folder = tmp_path / str(turn)
        foreign(folder, interval=0.01)  # a dead one, which all of them find
        held, refused, lost, all_in = [], [], [], threading.Barrier(8)

        def enter(folder=folder, held=held, refused=refused, lost=lost, all_in=all_in):
            try:
                with FolderLock(folder, "training", interval=0.01, patience=0.04) as mine:
                    held.append(mine.me.token)
                    all_in.wait(60)
                    mine.check()
            except FolderInUse:
                refused.append(1)
                all_in.wait(60)
            except LockLost:
                lost.append(1)

        threads = [threading.Thread(target=enter) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(held), len(refused), len(lost)) == (1, 7, 0) and os.listdir(folder) == []


def test_one_that_died_while_it_removed_a_dead_lock_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "CLAIM_PATIENCE", 0.2)
    foreign(tmp_path)
    (tmp_path / lock.CLAIM).touch()
    with quick(tmp_path) as mine:
        mine.check()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("flocked", [True, False], ids=["flock", "without flock"])
def test_a_killed_holder_of_this_machine_is_dead_at_once(tmp_path, monkeypatch, flocked):
    script = "import os, sys; from megatron_apt import lock"
    script += "" if flocked else "; lock._flocked = lambda *_: False"
    script += "; lock.FolderLock(sys.argv[1], 'training').__enter__(); os._exit(9)"
    subprocess.run([sys.executable, "-c", script, tmp_path])
    assert (tmp_path / lock.NAME).exists()
    monkeypatch.setattr(lock.time, "sleep", lambda _: pytest.fail("waited for a dead process"))
    with FolderLock(tmp_path, "training"):
        pass


def test_a_process_number_used_again_is_not_the_holder(tmp_path):
    holder = replace(
        lock._me("training", 0.05), token="theirs", flocked=False, born=lock._born(os.getpid()) + "0"
    )
    (tmp_path / lock.NAME).write_text(json.dumps(vars(holder)))
    assert lock._lives(holder, lock._me("training", 1), tmp_path / lock.NAME) is False
    assert (
        lock._lives(
            replace(holder, born=lock._born(os.getpid())), lock._me("training", 1), tmp_path / lock.NAME
        )
        is True
    )


def test_another_machines_silent_holder_is_watched_and_then_followed(tmp_path, capsys):
    foreign(tmp_path)
    with quick(tmp_path) as mine:
        mine.check()
    assert "process 4711" in capsys.readouterr().out


def test_another_machines_live_holder_is_left_alone(tmp_path):
    holder = foreign(tmp_path)
    ended = threading.Event()

    def beat(count=0):
        while not ended.wait(0.02):
            count += 1
            (tmp_path / "next").write_text(json.dumps(vars(replace(holder, beat=count))))
            (tmp_path / "next").replace(tmp_path / lock.NAME)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with (
            pytest.raises(FolderInUse, match=r"process 4711 of .* on node7"),
            FolderLock(tmp_path, "training", patience=30),
        ):
            pytest.fail("entered")
    finally:
        ended.set()
        thread.join()


def test_a_requeued_job_follows_its_earlier_start_at_once(tmp_path, monkeypatch):
    foreign(tmp_path, job="77", restart=1)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setattr(lock.time, "sleep", lambda _: pytest.fail("waited for a job that SLURM has ended"))
    with FolderLock(tmp_path, "training"):
        pass


@pytest.mark.parametrize(
    "contents", [b"", b"{", b'{"token": 3}', b"\xff" * 5000], ids=["empty", "torn", "another's", "bytes"]
)
def test_a_damaged_lock_is_watched_and_then_replaced(tmp_path, contents):
    (tmp_path / lock.NAME).write_bytes(contents)
    with quick(tmp_path) as mine:
        mine.check()


@pytest.mark.parametrize("theft", ["deleted", "taken"])
def test_a_holder_that_lost_the_folder_stops_and_leaves_the_others_lock(tmp_path, theft):
    with (
        pytest.raises(
            LockLost, match="is gone" if theft == "deleted" else "belongs to training by process 4711"
        ),
        quick(tmp_path) as mine,
    ):
        (tmp_path / lock.NAME).unlink()
        if theft == "taken":
            foreign(tmp_path)
        mine.check()
    assert (tmp_path / lock.NAME).exists() == (theft == "taken")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with (
            pytest.raises(ValueError, match=r"file.*cannot be written .*another output folder"),
            quick(tmp_path / place),
        ):
            pytest.fail("entered")


@pytest.mark.parametrize(
    "plant",
    [
        os.mkfifo,
        os.mkdir,
        lambda place: os.symlink("gone", place),
        lambda place: os.symlink("/dev/zero", place),
        lambda place: os.symlink(place, place),
    ],
    ids=["pipe", "folder", "dangling link", "device", "circle"],
)
def test_what_is_no_file_is_refused_by_name_at_once(tmp_path, monkeypatch, plant):
    plant(tmp_path / lock.NAME)
    monkeypatch.setattr(lock.time, "sleep", lambda _: pytest.fail("waited"))
    with (
        pytest.raises(ValueError, match=r"\.lock: cannot be written \(it is no plain file; remove it\)"),
        FolderLock(tmp_path, "training"),
    ):
        pytest.fail("entered")
    assert os.listdir(tmp_path) == [lock.NAME]


@pytest.mark.parametrize("interval", ["1e18", "1e400", "NaN", "0", "-1", '"1"'])
def test_a_sign_of_life_once_in_an_age_is_none(tmp_path, interval):
    text = json.dumps(vars(foreign(tmp_path)))
    (tmp_path / lock.NAME).write_text(text.replace('"interval": 0.05', f'"interval": {interval}'))
    assert lock._parsed((tmp_path / lock.NAME).read_bytes()) is None
    with quick(tmp_path):
        pass


def test_a_lock_replaced_by_something_else_is_lost(tmp_path):
    with pytest.raises(LockLost, match="is gone"), quick(tmp_path) as mine:
        (tmp_path / lock.NAME).unlink()
        os.mkfifo(tmp_path / lock.NAME)
        mine.check()


def test_a_forked_child_does_not_keep_the_folder(tmp_path):
    with quick(tmp_path):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(writer)
            os.read(reader, 1)  # until the parent closes its end
            os._exit(0)
    with quick(tmp_path):  # the child still runs
        pass
    os.close(writer)
    os.waitpid(child, 0)


def test_file_systems_without_links(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(lock.os, "link", refused)
    with quick(tmp_path) as mine:
        mine.check()
        with pytest.raises(FolderInUse), quick(tmp_path):
            pytest.fail("entered")


@pytest.mark.dist
def test_every_rank_hears_what_the_main_one_found(ranks, tmp_path):
    with quick(tmp_path):
        assert all(str(os.getpid()) in found for found in ranks(2).run(_entered, ParallelConfig(), tmp_path))
    assert ranks(2).run(_entered, ParallelConfig(), tmp_path) == ["", ""]


def _entered(mesh, folder) -> str:
    try:
        with quick(folder, mesh=mesh) as mine:
            mine.check()
    except FolderInUse as error:
        return str(error)
    return ""
