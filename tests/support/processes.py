"""Training on real processes that are killed, frozen or fail: script, start, outputs."""

import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_apt.config import ParallelConfig
from support.ranks import forks


class Script:
    """A script in a process of its own, forked from one that has its imports; used as a subprocess.Popen."""

    def __init__(self, file: Path, arguments: list[str], environment: dict[str, str], said: Path):
        self._said = said
        self._process = forks().Process(target=_play, args=(file, arguments, environment, said))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it printed, once it has ended."""
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired(str(self._said), timeout or 0.0)
        return self._said.read_text(errors="replace"), None


def _play(file: Path, arguments: list[str], environment: dict[str, str], said: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(output, number)
    sys.argv = [str(file), *arguments]
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    runpy.run_path(str(file), run_name="__main__")


def start(
    tmp_path, datasets, script: str, world: int = 2, parallel: ParallelConfig | None = None
) -> list[Script]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    file = tmp_path / "script.py"
    file.write_text(PREAMBLE.replace("PARALLEL", repr(parallel or ParallelConfig())) + script)
    shared = dict(
        os.environ,
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
    )
    shared["PYTHONPATH"] = os.pathsep.join(map(str, Path(__file__).parents[1:3]))
    return [
        Script(
            file,
            [str(datasets), str(tmp_path / "run")],
            shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            tmp_path / f"said-{rank}",
        )
        for rank in range(world)
    ]


PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
import torch
import megatron_apt
from megatron_apt.config import GuardConfig, ParallelConfig
from megatron_apt.parallel import startup
from megatron_apt.schedule.execute import Executor
from megatron_apt.training.train import train
from support.runs import config

torch.set_num_threads(1)
mesh = startup.start(PARALLEL)
guards = GuardConfig(rank_timeout=6.0)
run = config(
    Path(sys.argv[1]), sys.argv[2], "flow", iterations=10_000, save_every=2, save_async=False, guards=guards
)
original = Executor.run
def at_iteration_3(act):
    def wrapped(self, program, batches, step):
        if batches(0)[0].iteration == 3:
            act()
        return original(self, program, batches, step)
    Executor.run = wrapped
"""


def ends(processes: list[Script], within: float) -> list[str]:
    """Outputs, once all have ended by themselves."""
    until = time.monotonic() + within
    try:
        return [process.communicate(timeout=max(0.1, until - time.monotonic()))[0] for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail("a rank hangs")
    finally:
        for process in processes:
            process.kill()
