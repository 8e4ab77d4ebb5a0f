"""Signals before training stands: from a training program's first line on, SIGTERM and
SIGUSR1 end it with the code by which it is queued again.

Nothing has been computed since the last checkpoint then, so there is nothing to save. The
handler raises SystemExit; where the main thread sits in a call that does not return to
Python (waiting for other ranks), a thread ends the process a few seconds later. Standard
library only: this is imported before anything else.
"""

import os
import signal
import socket
import sys
import threading
import time

REQUEUE = 99  # until the configuration is read
_PATIENCE = 5.0  # seconds in which the program may end by itself
_WATCHED = (signal.SIGTERM, signal.SIGUSR1)


class _StartUp:
    """What the handlers know."""

    def __init__(self):
        self.code = REQUEUE
        self.over = False
        self.received = 0


_state = _StartUp()


def starts_training(argv: list[str]) -> bool:
    """Whether these arguments are those of `megatron-apt train` or `python -m
    megatron_apt train`, also while Python looks for the latter.
    """
    return argv[1:2] == ["train"] and (
        argv[0] == "-m" or os.path.basename(argv[0]) in ("megatron-apt", "__main__.py")
    )


def stand() -> None:
    """Sets the handlers; again is no harm. Only a program's main thread may."""
    if signal.getsignal(signal.SIGTERM) is _note or threading.current_thread() is not threading.main_thread():
        return
    for number in _WATCHED:
        signal.signal(number, _note)
    here, there = socket.socketpair()
    there.setblocking(False)
    signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(here, there), name="signals", daemon=True).start()


def requeue_with(code: int) -> None:
    """The exit code, once the configuration says it."""
    _state.code = code


def over() -> None:
    """Start-up is over: training's own handlers stand, and after them a signal has nothing to end."""
    _state.over = True


def _note(number: int, frame: object) -> None:
    if _state.over or _state.received:
        return
    _state.received = number
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        name = signal.Signals(number).name
        os.write(
            2,
            f"megatron-apt: stopped by {name} during start-up, before the first iteration; nothing was "
            "changed\n".encode(),
        )
    sys.exit(_state.code)


def _watch(here: socket.socket, there: socket.socket) -> None:
    """The interpreter writes each signal's number to `there` at once, whatever the main thread does."""
    while number := here.recv(1):
        if number[0] in _WATCHED:
            time.sleep(_PATIENCE)
            if not _state.over:
                os._exit(_state.code)
