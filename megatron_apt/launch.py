"""Starts the demo on as many processes as serve it: one per core up to two, since networks this small gain little from more threads in one."""

import os
import sys

from megatron_apt.parallel.startup import placement
from megatron_apt.recipes import DemoConfig

MOST_RANKS = 2  # the recipes cut their batches in two


def relaunch(config: DemoConfig) -> None:
    """Replaces this process by a torchrun of the same demo, unless it runs under a launcher already or one process is enough."""
    import torch

    cores = os.cpu_count() or 1
    ranks = min(MOST_RANKS, cores)
    if "RANK" in os.environ or placement()[1] > 1 or ranks == 1 or torch.cuda.is_available():
        return
    options = [f"--root={config.root}", f"--stage={config.stage}", "--quick" if config.quick else "--no-quick"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "megatron_apt", "demo"]
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // ranks))
    os.execv(sys.executable, [sys.executable, *launcher, *options])
