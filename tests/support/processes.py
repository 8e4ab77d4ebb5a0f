"""Training on real processes that are killed, frozen or fail: script, start, outputs."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_apt.config import ParallelConfig


def start(
    tmp_path, datasets, script: str, world: int = 2, parallel: ParallelConfig | None = None
) -> list[subprocess.Popen]:
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
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(file), str(datasets), str(tmp_path / "run")],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
import megatron_apt
from megatron_apt.config import GuardConfig, ParallelConfig
from megatron_apt.parallel import startup
from megatron_apt.schedule.execute import Executor
from megatron_apt.training.train import train
from support.runs import config

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


def ends(processes, within: float) -> list[str]:
    """Outputs, once all have ended by themselves."""
    until = time.monotonic() + within
    try:
        return [process.communicate(timeout=max(0.1, until - time.monotonic()))[0] for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail("a rank hangs")
    finally:
        for process in processes:
            process.kill()
