"""Finds ranks that died, so that the others stop with a message that names them instead
of hanging in a collective.

Every rank has a thread that counts up a number of its own in the rendezvous store, and
looks at the number of the next rank (a ring: the cost does not grow with the world). A
number that stands still for too long, or a rank that says goodbye with an error, is
written into the store as the reason to stop; each rank reads it, prints it, and ends if
it has not ended by itself after a grace period.
"""

import datetime
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from megatron_apt.errors import LOST, described, is_lost_rank
from megatron_apt.once import say_once

GRACE = 5.0  # seconds in which a rank may end by itself

_watches = itertools.count()


class Watch:
    """The watch of one rank; a context manager around training.

    Args:
        timeout: seconds without a sign of life after which a rank counts as lost; 0
            watches nothing.
        interval: seconds between two signs.
    """

    def __init__(self, rank: int, world: int, timeout: float, interval: float = 1.0):
        self.rank, self.world, self.timeout, self.interval = (
            rank,
            world,
            timeout,
            min(interval, timeout / 4) if timeout else interval,
        )
        self.active = timeout > 0 and world > 1
        self._ended = threading.Event()
        self._well = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watch":
        if self.active:
            # A connection of its own: the main thread may wait inside the shared one for minutes.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(
                address, port, None, False, datetime.timedelta(seconds=self.timeout), wait_for_workers=False
            )
            # torchrun's store outlives a restart, and one process may train several
            # times: each watch has keys of its own.
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = dist.PrefixStore(f"watch/{restart}/{next(_watches)}", store)
            self._store.set(f"host/{self.rank}", f"{socket.gethostname()}, process {os.getpid()}")
            self._turn = time.monotonic()
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()
            threading.Thread(target=self._watch_the_watch, name="watch-store", daemon=True).start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if not self.active:
            return
        lost = error is not None and is_lost_rank(error)
        if error is not None and not isinstance(error, KeyboardInterrupt):
            self._explain(error, lost)
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * self.interval)
        if lost:
            # Leaving the process group may wait for the lost rank.
            threading.Thread(target=_end_after, args=(GRACE,), name="watch-end", daemon=True).start()
            raise SystemExit(LOST) from None

    def leave(self) -> None:
        """Says that this rank has finished well: its silence from now on is no sign of death."""
        self._well = True

    def _explain(self, error: BaseException, failed_collective: bool) -> None:
        """Tells the others why this rank ends; if its error may come from a lost rank, says which."""
        try:
            lost = self._silent() if failed_collective else []
            message = (
                f"{' and '.join(map(self._named, lost))} died"
                if lost
                else f"{self._named(self.rank)} stopped: {described(error)}"
            )
            reason = self._store.compare_set("stop", "", message).decode()  # the first reason stays
        except RuntimeError:
            reason = self._store_gone
        if failed_collective:
            self._say(reason)

    def _say(self, reason: str) -> None:
        """One of the ranks that stop for the same reason says so, as long as there is a store to agree by."""
        try:
            first = self._store.add("said", 1) == 1
        except RuntimeError:
            first = say_once(reason) == reason
        if first:
            self._print(reason)

    @property
    def _store_gone(self) -> str:
        return f"{self._keeper}, which keeps the rendezvous store, died"

    @property
    def _keeper(self) -> str:
        return "the torchrun agent" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"

    def _silent(self) -> list[int]:
        """Ranks whose number stands still over a few intervals."""
        before = self._beats()
        time.sleep(4 * self.interval)
        after = self._beats()
        return [r for r in range(self.world) if r != self.rank and before[r] == after[r]]

    def _beats(self) -> list[bytes | None]:
        return [self._beat(r) for r in range(self.world)]

    def _beat(self, rank: int) -> bytes | None:
        return self._store.get(f"beat/{rank}") if self._store.check([f"beat/{rank}"]) else None

    def _named(self, rank: int) -> str:
        host = (
            self._store.get(f"host/{rank}").decode()
            if self._store.check([f"host/{rank}"])
            else "never started watching"
        )
        return f"rank {rank} ({host})"

    def _run(self) -> None:
        beat, neighbour = 0, (self.rank + 1) % self.world
        seen, since = None, time.monotonic()
        try:
            while not self._ended.wait(self.interval):
                self._turn = time.monotonic()
                beat += 1
                self._store.set(f"beat/{self.rank}", str(beat))
                value = self._beat(neighbour)
                if value != seen:
                    seen, since = value, time.monotonic()
                elif value != b"done" and time.monotonic() - since > self.timeout:
                    self._store.compare_set(
                        "stop", "", f"{self._named(neighbour)} gave no sign of life for {self.timeout:.0f} s"
                    )
                if self._store.check(["stop"]):
                    self._stop(self._store.get("stop").decode(), self._say)
                    return
            if self._well:
                self._store.set(f"beat/{self.rank}", "done")
        except RuntimeError:  # the store is gone, and with it the rank that kept it
            self._stop(self._store_gone, self._say)

    def _watch_the_watch(self) -> None:
        """A store whose keeper is frozen does not answer, and a question to it has no time limit."""
        while not self._ended.wait(self.interval):
            if time.monotonic() - self._turn > self.timeout:
                reason = (
                    f"{self._keeper}, which keeps the rendezvous store, gave no sign of life for "
                    f"{self.timeout:.0f} s"
                )
                self._stop(reason, lambda reason: self._print(reason) if say_once(reason) == reason else None)
                return

    def _stop(self, reason: str, say: Callable[[str], None] | None = None) -> None:
        if not self._ended.wait(GRACE):
            (say or self._print)(reason)
            os._exit(LOST)

    def _print(self, reason: str) -> None:
        print(f"megatron-apt: rank {self.rank}: {reason}; stopping", file=sys.stderr, flush=True)


def _end_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(LOST)
