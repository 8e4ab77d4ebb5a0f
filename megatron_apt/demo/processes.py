"""Starts the demo on as many processes as serve it: one per core up to two, since
networks this small gain little from more threads in one.
"""

import os
import signal
import socket
import subprocess
import sys
import time

from megatron_apt.demo.files import prepare
from megatron_apt.demo.recipes import DemoConfig
from megatron_apt.parallel.startup import placement

MOST_RANKS = 2  # the recipes cut their batches in two
PATIENCE = 15.0  # seconds for the other ranks to end by themselves after one that failed


def relaunch(config: DemoConfig) -> None:
    """Runs the same demo on some processes and ends with their exit code, unless this is
    one of several already or one is enough.

    Raises:
        ValueError: it cannot run in its folder.
    """
    import torch

    cores = os.cpu_count() or 1
    ranks = min(MOST_RANKS, cores)
    if "RANK" in os.environ or placement()[1] > 1 or ranks == 1 or torch.cuda.is_available():
        return
    prepare(config)
    options = [
        f"--root={config.root}",
        f"--stage={config.stage}",
        "--quick" if config.quick else "--no-quick",
    ]
    sys.exit(
        run_ranks(
            [sys.executable, "-m", "megatron_apt", "demo", *options], ranks, threads=max(1, cores // ranks)
        )
    )


def run_ranks(command: list[str], ranks: int, threads: int = 1) -> int:
    """Runs a command once for each rank, as torchrun would on one machine, and passes
    signals on; the exit code of the first that failed, or 0.
    """
    meeting = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": str(threads),
    }
    places = [meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    # Groups of their own: the terminal sends Ctrl-C to this process alone, which passes it on once.
    processes = [subprocess.Popen(command, env=os.environ | place, process_group=0) for place in places]
    passed_on = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {
        number: signal.signal(number, lambda number, _: _send(processes, number)) for number in passed_on
    }
    try:
        return _awaited(processes)
    finally:
        _send(processes, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)


def _awaited(processes: list[subprocess.Popen]) -> int:
    failed, since = 0, 0.0
    while any(process.poll() is None for process in processes):
        failed = failed or next(filter(None, (process.returncode for process in processes)), 0)
        since = since or (time.monotonic() if failed else 0.0)
        if failed and time.monotonic() - since > PATIENCE:
            break
        time.sleep(0.1)
    failed = failed or next(filter(None, (process.returncode for process in processes)), 0)
    return 128 - failed if failed < 0 else failed  # as shells have it


def _send(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
