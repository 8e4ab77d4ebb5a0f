"""Signals before training, and what the batch script makes of exit codes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_apt.once import say_once
from megatron_apt.training import signals

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm" / "train.sbatch"


def started(code: str) -> subprocess.Popen:
    """A program that begins like a training run, then runs this."""
    beginning = f"""
import importlib.util, sys, time, threading
spec = importlib.util.spec_from_file_location('signals', {signals.__file__!r})
signals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals)
signals._PATIENCE = 0.2
signals.stand()
"""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "SLURM_PROCID")}
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", beginning + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    "busy",
    ["time.sleep(60)", "import ctypes; ctypes.CDLL(None).pause(); ctypes.CDLL(None).pause()"],
    ids=["python", "a call"],
)
def test_a_signal_during_start_up_ends_with_the_requeue_code(number, busy):
    process = started(
        f"signals.requeue_with(42)\nprint('ready', flush=True)\nwhile True:\n    try:\n        {busy}\n    "
        "except Exception:\n        pass"
    )
    process.send_signal(number)
    assert process.wait(30) == 42
    assert process.stderr.read().count(f"stopped by {number.name} during start-up") <= 1


def test_after_start_up_the_first_handlers_do_nothing():
    process = started("signals.over()\nprint('ready', flush=True)\ntime.sleep(1)\nsys.exit(7)")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 7


@pytest.mark.parametrize(
    ("argv", "training"),
    [
        (["-m", "train", "r.py:f"], True),
        (["/venv/bin/megatron-apt", "train"], True),
        (["/x/megatron_apt/__main__.py", "train"], True),
        (["-m", "sample"], False),
        (["/x/pytest", "train"], False),
        (["-c"], False),
    ],
)
def test_only_training_programs_take_signals(argv, training):
    assert signals.starts_training(argv) == training


def submitted(folder: Path, code: str, state: str = "RUNNING None", **env: str) -> tuple[int, str]:
    """Exit code of the batch script, and what it asked of SLURM, where its tasks end with
    `code` and the job is in this state then.
    """
    for name, body in (
        ("srun", f"trap : TERM\n{code}"),
        ("scontrol", f'echo "$@" >> {folder}/asked'),
        ("squeue", f"echo {state}"),
    ):
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    shared = dict(
        os.environ,
        PATH=f"{folder}:{os.environ['PATH']}",
        SLURM_JOB_ID="7",
        SLURM_SUBMIT_DIR=str(folder),
        SLURM_CPUS_PER_TASK="12",
        **env,
    )
    done = subprocess.run(
        ["bash", str(SCRIPT), "r.py:f"], env=shared, capture_output=True, text=True, timeout=60
    )
    asked = folder / "asked"
    text = asked.read_text() if asked.exists() else ""
    asked.unlink(missing_ok=True)
    return done.returncode, text


@pytest.mark.parametrize(
    ("code", "end", "asked"),
    [
        ("exit 0", 0, ""),
        ("exit 1", 1, ""),
        ("exit 2", 2, ""),
        ("exit 130", 130, ""),
        ("exit 99", 0, "requeue 7\n"),
        ("exit 138", 0, "requeue 7\n"),
        ("kill -TERM $PPID; sleep 0.3; exit 99", 0, "requeue 7\n"),  # SLURM signals the batch shell too
        ("kill -USR1 $PPID; sleep 0.1; kill -TERM $PPID; sleep 0.1; exit 1", 1, ""),
        (
            '[ "$SRUN_CPUS_PER_TASK $*" = "12 --kill-on-bad-exit=0 megatron-apt train r.py:f" ] || exit 3',
            0,
            "",
        ),
    ],
)
def test_the_batch_script_requeues_what_was_saved(tmp_path, code, end, asked):
    assert submitted(tmp_path, code) == (end, asked)


def test_the_batch_script_leaves_a_cancelled_job_alone(tmp_path):
    ends = [
        submitted(tmp_path, "exit 99", state)
        for state in ("COMPLETING None", "COMPLETING TimeLimit", "RUNNING None")
    ]
    assert ends == [(99, ""), (0, "requeue 7\n"), (0, "requeue 7\n")]
    assert submitted(tmp_path, "exit 143", "COMPLETING None") == (143, "")


def test_the_batch_script_retries_a_dead_rank_a_bounded_number_of_times(tmp_path):
    ends = [submitted(tmp_path, "exit 137", MAX_RETRIES="2") for _ in range(3)]
    assert ends == [(0, "requeue 7\n"), (0, "requeue 7\n"), (137, "")]
    assert submitted(tmp_path, "exit 99") == (0, "requeue 7\n")  # it has got on: the count begins anew
    assert submitted(tmp_path, "exit 70", MAX_RETRIES="1") == (0, "requeue 7\n")


def test_one_process_of_a_launch_prints_what_all_would(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert [say_once("a") for _ in range(2)] == ["a", "a"]
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert [say_once("a") for _ in range(3)] == ["a", 1, 1] and say_once("b") == "b"
    for restart in ("0", "1"):
        for name, value in (("SLURM_JOB_ID", "7"), ("SLURM_STEP_ID", "0"), ("SLURM_RESTART_COUNT", restart)):
            monkeypatch.setenv(name, value)
        assert [say_once("a") for _ in range(2)] == ["a", 1]
