import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import megatron_apt  # noqa: F401  (must stand before any import of megatron.core)
from megatron_apt.config import ParallelConfig
from megatron_apt.parallel.startup import start

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mesh():
    """A mesh of this one process."""
    return start(ParallelConfig())


@pytest.fixture(scope="session")
def ranks():
    """ranks(world) -> running processes, started again if a failed test ended them."""
    from ranks import Ranks

    pools: dict[int, Ranks] = {}

    def get(world: int) -> Ranks:
        if world not in pools or not all(process.is_alive() for process in pools[world].processes):
            pools[world] = Ranks(world)
        return pools[world]

    yield get
    for pool in pools.values():
        pool.close()
