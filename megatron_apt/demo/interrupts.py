"""How the demo ends on a signal: one line that says how to go on, and an exit code that is not 0."""

import os
import signal
import sys
import threading
from types import FrameType

from megatron_apt.demo.recipes import DemoConfig
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.training.guards import INTERRUPTED, Stopped


class Interrupts:
    """While it is entered, Ctrl-C (which training handles by itself, saving first) ends
    the process with a line, not with a traceback.

    A rank that waits for one which has ended already sees a lost connection instead of
    the signal: that is no error then either.
    """

    def __init__(self, config: DemoConfig, mesh: Mesh):
        self.config, self.mesh, self.received = config, mesh, False

    def __enter__(self) -> "Interrupts":
        self._before = None
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received = True
            raise KeyboardInterrupt

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN if self.received else self._before)
        if not (self.received or isinstance(error, KeyboardInterrupt | Stopped)):
            return
        if self.mesh.is_main:
            print(
                f"megatron-apt: {self.config.root}: the demo was interrupted; the same command goes on",
                file=sys.stderr,
            )
        code = int(error.code or 0) if isinstance(error, Stopped) else INTERRUPTED
        if self.mesh.world.size == 1:
            if self._before is not None:
                signal.signal(signal.SIGINT, self._before)
            raise SystemExit(code) from None
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # other ranks may be waited for at exit
