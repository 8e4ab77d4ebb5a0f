"""Runs a function on several ranks over gloo. The processes live for the whole test
session, so that imports are paid once.
"""

import contextlib
import functools
import gc
import io
import os
import queue
import socket
import traceback

import torch
import torch.multiprocessing as mp

# Imported once, in a process that all ranks are forked from: an import takes each of them seconds
_IMPORTED = (
    "megatron_apt.training.train",
    "megatron_apt.models.spec",
    "megatron.core.parallel_state",
    "diffusers.models.transformers.transformer_wan",
    "pytest",
)


def forks():
    """Starts processes from one that has imported what they need, and has never computed."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTED])
    return context


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(rank: int, world: int, port: int, tasks, results) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    import megatron_apt  # noqa: F401
    from megatron_apt.parallel import startup

    caches = _caches()
    gc.freeze()  # what was imported is looked through no more
    while (task := _next(tasks)) is not None:
        function, parallel, port, args = task
        try:
            if port:
                _forget(caches)
                startup.stop()
                os.environ["MASTER_PORT"] = str(port)
            value = function(startup.start(parallel), *args)
            results.put((rank, _packed(value), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))


def _packed(value) -> bytes:
    """A queue would pass every tensor as a file of its own, and pickle the whole of what one is a view of."""
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def _caches() -> list:
    return [one for one in gc.get_objects() if isinstance(one, functools._lru_cache_wrapper)]


def _forget(caches: list) -> None:
    """Lets go of every mesh. A gloo group that somebody still holds keeps a thread that
    wakes a hundred times a second; with some hundred of them tests take twice as long.
    """
    for cache in (*caches, *_caches()):
        cache.cache_clear()
    gc.collect()


def _next(tasks):
    """The next task; None too where the tests that would send it were killed."""
    while mp.parent_process().is_alive():
        with contextlib.suppress(queue.Empty):
            return tasks.get(timeout=5)
    return None


class Ranks:
    """`world` processes; `run` calls function(mesh, *args) on each and returns the results by rank."""

    def __init__(self, world: int):
        self.world = world
        self.parallel = None  # the mesh they are on
        context = forks()
        self.results = context.Queue()
        self.tasks = [context.Queue() for _ in range(world)]
        port = _free_port()
        self.processes = [
            context.Process(target=_serve, args=(r, world, port, self.tasks[r], self.results), daemon=False)
            for r in range(world)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, parallel, *args, timeout: float = 240.0) -> list:
        port = _free_port() if parallel != self.parallel else 0
        self.parallel = parallel
        for tasks in self.tasks:
            tasks.put((function, parallel, port, args))
        answers, errors = {}, []
        for _ in range(self.world):
            rank, value, error = self.results.get(timeout=timeout)
            answers[rank] = None if error else torch.load(io.BytesIO(value), weights_only=False)
            if error:
                errors.append(f"rank {rank}:\n{error}")
                break  # the others may wait for this one in a collective
        if errors:
            self.close()
            raise AssertionError("\n".join(errors))
        return [answers[rank] for rank in range(self.world)]

    def close(self) -> None:
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
