"""A process that takes inputs one by one, and the watch over it: time, memory and death.

The process imports the package once. It is started again after a fault that it cannot
outlive.
"""

import contextlib
import faulthandler
import fcntl
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

MOST_MIB = 2048
_KILL_MIB = 3584  # before it takes the machine with it
_READY = 300.0  # seconds that imports and valid inputs may take


@dataclass(frozen=True)
class Result:
    boundary: str
    number: int
    what: str
    kind: str
    message: str
    seconds: float
    peak_mib: int

    @property
    def good(self) -> bool:
        from fuzzing.boundary import GOOD

        return self.kind in GOOD


class Worker:
    """The process, seen from outside.

    Args:
        root: folder for valid inputs, the inputs under way and the log.
        limit: seconds that one input may take.
    """

    def __init__(self, root: Path, seed: int, limit: float = 30.0, name: str = "0"):
        self.root, self.seed, self.limit = root, seed, limit
        self.log = root / f"worker-{name}.log"
        self.scratch = root / f"scratch-{name}"
        self._process: subprocess.Popen | None = None

    def run(self, boundary: str, number: int) -> Result:
        """One input, whatever it does."""
        self._ask({"prepare": boundary}, _READY)
        began, noise = time.monotonic(), self.log.stat().st_size
        answer, fault = self._ask({"boundary": boundary, "number": number}, self.limit)
        seconds = time.monotonic() - began
        if fault:
            what = self._ask({"describe": boundary, "number": number}, _READY)[0].get(
                "what", "cannot be made again"
            )
            return Result(boundary, number, what, fault[0], fault[1], seconds, fault[2])
        kind, message = answer["kind"], answer["message"]
        if kind in ("fine", "named", "skipped") and answer["peak_mib"] > MOST_MIB:
            kind, message = "memory", f"{answer['peak_mib']} MiB; {kind}: {message}"
        if answer["quiet"] and kind in ("fine", "named", "skipped") and self.log.stat().st_size > noise:
            kind, message = (
                "noise",
                f"{self.log.read_bytes()[noise:].decode(errors='replace')[:300]!r}; {kind}: {message}",
            )
        return Result(boundary, number, answer["what"], kind, message, answer["seconds"], answer["peak_mib"])

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def _start(self) -> subprocess.Popen:
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "fuzzing.worker",
                    str(self.root),
                    str(self.scratch),
                    str(self.seed),
                    str(self.limit),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _paths(), "HF_HUB_OFFLINE": "1"},
            )

    def _ask(self, request: dict, limit: float) -> tuple[dict, tuple[str, str, int] | None]:
        """The answer, or the fault that kept the process from giving one: kind, message, MiB."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None  # both are pipes
        end, most = time.monotonic() + limit, 0
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        while not select.select([process.stdout], [], [], 0.05)[0]:
            most = max(most, _resident_mib(process.pid))
            if most > _KILL_MIB:
                self.stop()
                return {}, ("memory", f"over {_KILL_MIB} MiB, stopped", most)
            if time.monotonic() > end:
                self.stop()
                return {}, ("hang", f"over {limit:g} s; {_stack(self.log)}", most)
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            self.stop()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return {}, ("died", f"{how}; {_stack(self.log)}", most)
        return json.loads(line), None


def _paths() -> str:
    tools = Path(__file__).parents[1]
    return os.pathsep.join(
        (str(tools), str(tools.parent), str(tools.parent / "tests"), os.environ.get("PYTHONPATH", ""))
    )


def _stack(log: Path) -> str:
    """Where the process was: the end of what faulthandler wrote."""
    last = re.split(
        r"Timeout \(|Fatal Python error|Traceback \(", log.read_bytes()[-30_000:].decode(errors="replace")
    )[-1]
    lines = (
        last.partition("Thread 0x")[2].rpartition("Thread 0x")[2].splitlines()
        if "Thread 0x" in last
        else last.splitlines()
    )
    frames = [line.strip() for line in lines if line.strip().startswith("File ")]
    ours = [line for line in frames if "megatron_apt" in line and "cli.py" not in line] or frames
    return " < ".join(line.split("/")[-1].replace('"', "") for line in ours[:4])


def _resident_mib(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() >> 20
    except (OSError, IndexError):
        return 0


def _peak_mib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM"))


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def serve(root: Path, scratch: Path, seed: int, limit: float) -> None:
    """Answers requests from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes to the log
    faulthandler.enable(_LOG)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 30, 8 << 30))
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line), root, scratch, seed, limit)).encode() + b"\n")
        answers.flush()


def _name(function: Callable) -> str:
    return getattr(function, "__name__", "prepare")


def _answer(request: dict, root: Path, scratch: Path, seed: int, limit: float) -> dict:
    from fuzzing import BOUNDARIES
    from fuzzing.boundary import attempt

    boundary = BOUNDARIES[request.get("prepare") or request.get("boundary") or request["describe"]]
    valid = root / "valid" / f"{boundary.prepare.__module__.rpartition('.')[2]}.{_name(boundary.prepare)}"
    if "prepare" in request:
        if boundary.name not in _WARM:
            _prepare(boundary, valid, scratch)
            _WARM.add(boundary.name)
        return {}
    if "describe" in request:
        return {"what": _described(boundary, request["number"], seed, valid, scratch)}
    _forget_peak()
    faulthandler.dump_traceback_later(0.9 * limit, file=_LOG)
    began = time.monotonic()
    case, outcome = attempt(boundary, request["number"], seed, valid, scratch)
    seconds = time.monotonic() - began
    faulthandler.cancel_dump_traceback_later()
    sys.stderr.flush()
    return {
        "what": case.what,
        **asdict(outcome),
        "seconds": seconds,
        "peak_mib": _peak_mib(),
        "quiet": boundary.quiet,
    }


_LOG = os.fdopen(os.dup(2), "w")  # of this process, even where the package sends descriptor 2 elsewhere
_WARM: set[str] = set()  # boundaries that this process is ready for


def _prepare(boundary, valid: Path, scratch: Path) -> None:
    """Valid inputs, if no worker has made them yet, and what is imported for them."""
    import megatron_apt  # noqa: F401  (must stand before any import of megatron.core)

    valid.parent.mkdir(parents=True, exist_ok=True)
    with open(valid.with_name(valid.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (valid / ".whole").exists():
            shutil.rmtree(valid, ignore_errors=True)
            valid.mkdir()
            boundary.prepare(valid)
            (valid / ".whole").touch()
    folder = scratch / "warm"
    folder.mkdir(parents=True, exist_ok=True)
    boundary.warm(valid, folder)
    shutil.rmtree(folder)


def _described(boundary, number: int, seed: int, valid: Path, scratch: Path) -> str:
    folder = scratch / "again"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return boundary.make(random.Random(f"{boundary.name} {seed} {number}"), valid, folder).what


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
