"""One writer to a folder: a lock file that says who writes there, proves that it lives,
and loses the folder when it does not.

    # Refuses, naming the other, if another process writes there
    with FolderLock(output, "training") as lock:
        ...
        # Before each commit: raises LockLost if another has taken the folder over
        lock.check()

`.lock` is made with link(), which is atomic on NFS and Lustre too, and holds host,
process, job and a count that a thread raises every few seconds. Whether the holder lives
is asked of the kernel where it can know (a flock, on the same machine: containers share
it), of SLURM (a requeued job's earlier start is over), and else found by watching the
count over a while of our own clock: no two clocks are compared. A holder that was frozen
for longer than that, and has lost its lock, sees so at its next sign of life and at every
`check`.
"""

import contextlib
import datetime
import errno
import fcntl
import getpass
import json
import os
import socket
import stat
import threading
import time
import uuid
import weakref
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from megatron_apt.schema import Count, parse_json

if TYPE_CHECKING:  # torch is not needed to lock a folder
    from megatron_apt.parallel.mesh import Mesh

NAME = ".lock"
INTERVAL = 5.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without one after which a holder on another machine counts as dead
CLAIM = ".lock.claim"  # whose maker may remove `.lock`
CLAIM_PATIENCE = 10.0  # seconds, of the milliseconds that it is needed for
_held: "weakref.WeakSet[FolderLock]" = weakref.WeakSet()
# Whatever is planted under our name, opening it does not wait
_READING = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW
# Of the file, always: a sign of life overwrites it in place, and needs no space on a full
# disk
_LENGTH = 1024


class FolderInUse(ValueError):
    """Another process writes to this folder."""


class _NoFile(OSError):
    """`.lock` is a link, a pipe, a folder or a device: of none that writes here."""


class LockLost(ValueError):
    """Another process has taken the folder over, or the lock was deleted: nothing more
    may be written there.
    """


@dataclass(frozen=True)
class Holder:
    """What `.lock` says."""

    token: str
    what: str
    host: str
    pid: Count
    boot: str
    """Of the kernel: the same in all containers of a machine, another after a restart."""
    born: str
    """When the process started, by its kernel's count: a later process may have its number."""
    user: str
    job: str
    restart: int
    started: str
    flocked: bool
    interval: Annotated[float, msgspec.Meta(gt=0, le=60)]
    beat: Count = 0

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"{self.what} by process {self.pid} of {self.user} on {self.host}{job}, since {self.started}"


class FolderLock:
    """Holds a folder (made if it is not there): a context manager, entered once.

    Args:
        what: what is done there, for the message another process gets.
        option: what the user may change instead, for that message.
        mesh: the main rank takes the lock, and every rank raises what it raises.

    Raises (on entering):
        FolderInUse: naming host, process and job of the holder.
        ValueError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        what: str,
        option: str = "another output folder",
        mesh: "Mesh | None" = None,
        interval: float = INTERVAL,
        patience: float = PATIENCE,
    ):
        self.folder, self.file = Path(folder), Path(folder) / NAME
        self.option, self.mesh, self.interval, self.patience = option, mesh, interval, patience
        self.me = _me(what, interval)
        self.lost = False
        """Whether the lock is known to be another's by now."""
        self._file: int | None = None
        self._released = threading.Event()

    def __enter__(self) -> "FolderLock":
        if self.mesh is None:
            self._take()
        else:
            from megatron_apt.parallel.agree import on_main

            on_main(self.mesh, self._take)
        return self

    def __exit__(self, *_) -> None:
        if self._file is None:
            return
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # a folder that is gone needs no unlocking
            self._take_away(self.me.token)
        self._close()

    def check(self) -> None:
        """To be called before anything is committed. Does nothing but on the main rank.

        Raises:
            LockLost: naming who holds the folder now.
        """
        if self._file is None or not (self.lost or self._gone()):
            return
        self.lost = True
        now = None
        with contextlib.suppress(OSError):
            now = _parsed(_bytes(self.file))
        whose = f"belongs to {now} now" if now and now.token != self.me.token else "is gone"
        raise LockLost(
            f"{self.file}: this process's lock {whose}, so it stops writing: it stood still for a while and "
            "was taken for dead, or somebody removed the file. What was committed before is whole"
        )

    def _take(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._outlive()
        except OSError as error:
            place = error.filename or self.folder
            raise ValueError(
                f"{place}: cannot be written ({error.strerror or error}); check {self.folder}, or give "
                f"{self.option}"
            ) from error
        _held.add(self)
        self._thread = threading.Thread(target=self._live, name="lock", daemon=True)
        self._thread.start()

    def _create(self) -> bool:
        """Whether `.lock` could be made; it appears with its contents."""
        own = self.folder / f"{NAME}.{self.me.token}"
        descriptor = os.open(own, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            self.me = replace(self.me, flocked=_flocked(descriptor, fcntl.LOCK_EX))
            self._write(descriptor)
            if _linked(own, self.file, descriptor):
                self._file = descriptor
        finally:
            own.unlink(missing_ok=True)
            if self._file is None:
                os.close(descriptor)
        return self._file is not None

    def _outlive(self) -> None:
        """Returns when the folder may be free.

        Raises:
            FolderInUse: the holder lives.
        """
        seen, since, told = _bytes(self.file), time.monotonic(), False
        while (now := _bytes(self.file)) is not None:
            holder, waited = _parsed(now), time.monotonic() - since
            lives = True if now != seen else _lives(holder, self.me, self.file)
            # A holder that lives makes an unreadable one readable within seconds.
            patience = max(self.patience, 4 * holder.interval) if holder else min(self.patience, 4 * INTERVAL)
            if lives:
                self._refuse(holder)
            if lives is False or waited > patience:
                self._take_away(_mark(now))
                return
            if not told and waited > self.interval:
                told = True
                print(
                    f"{self.file}: {holder or 'not readable'}; watching it for {patience:.0f} s to see "
                    "whether that still runs",
                    flush=True,
                )
            time.sleep(min(0.5, self.interval / 4))

    def _refuse(self, holder: Holder | None) -> None:
        raise FolderInUse(
            f"{self.folder}: in use for {holder or 'something'}. Wait until that has ended, or give "
            f"{self.option}. (If it has died, starting again finds that out within {self.patience:.0f} s; "
            f"{self.file} need not be removed)"
        )

    def _take_away(self, mark: str) -> None:
        """Removes `.lock` if it is the marked one. The claim lets one process at a time
        look and remove, so none removes its successor's.
        """
        claim, seen, since = self.folder / CLAIM, None, 0.0
        while not _made(claim):
            if (now := _identity(claim)) != seen:
                seen, since = now, time.monotonic()
            # Its maker died in the moment between looking and removing
            elif time.monotonic() - since > CLAIM_PATIENCE:
                claim.unlink(missing_ok=True)
            time.sleep(0.01)
        try:
            if _mark(_bytes(self.file)) == mark:
                self.file.unlink(missing_ok=True)
        finally:
            claim.unlink(missing_ok=True)

    def _live(self) -> None:
        """Raises the count in `.lock`, in place, until released or lost."""
        while not self._released.wait(self.interval):
            self.me = replace(self.me, beat=self.me.beat + 1)
            with contextlib.suppress(OSError):  # a full or absent disk; whoever commits will hear of it
                if self._file is not None:
                    self._write(self._file)
                self.lost = self._gone()
            if self.lost:
                return

    def _write(self, descriptor: int) -> None:
        os.pwrite(descriptor, json.dumps(asdict(self.me)).encode().ljust(_LENGTH - 1) + b"\n", 0)
        os.fsync(descriptor)

    def _gone(self) -> bool:
        try:
            return _mark(_bytes(self.file)) != self.me.token
        except _NoFile:
            return True

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


# A forked child that outlives this process must not hold its folders.
os.register_at_fork(after_in_child=lambda: [held._close() for held in _held])


def _me(what: str, interval: float) -> Holder:
    env = os.environ
    job = next(
        (env[name] for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID") if env.get(name)), ""
    )
    restart = env.get("SLURM_RESTART_COUNT", "0")
    return Holder(
        token=uuid.uuid4().hex,
        what=what[:80],
        host=socket.gethostname()[:100],
        pid=os.getpid(),
        boot=_boot(),
        born=_born(os.getpid()),
        user=_user(),
        job=job[:100],
        restart=int(restart) if restart.isdecimal() else 0,
        started=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z"),
        flocked=False,
        interval=interval,
    )


def _user() -> str:
    try:
        return getpass.getuser()[:50]
    except (KeyError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return f"{socket.gethostname()[:100]}/{uuid.getnode():x}"


def _born(pid: int) -> str:
    """Process namespace and start time of a process; empty where there is none, or the
    system does not say.
    """
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
        return f"{os.readlink('/proc/self/ns/pid')} {fields[19]}"
    except (OSError, IndexError):
        return ""


def _lives(holder: Holder | None, me: Holder, file: Path) -> bool | None:
    """Whether the holder lives; None: not known here, so it must be watched."""
    if holder and holder.job and holder.job == me.job and holder.restart < me.restart:
        return False  # SLURM starts a job again when its earlier start is over
    here = holder is None or holder.boot == me.boot
    if here and _is_flocked(file):
        return True
    if holder is None or not here:
        return None
    if holder.flocked:
        return False  # it held one, and the kernel has let it go
    space = holder.born.partition(" ")[0]
    return _born(holder.pid) == holder.born if holder.born and space == me.born.partition(" ")[0] else None


def _is_flocked(file: Path) -> bool:
    try:
        descriptor = os.open(file, _READING)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that ask do not see each other
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(descriptor)
    return False


def _flocked(descriptor: int, kind: int) -> bool:
    """Whether this file system has such locks: a new file's is free."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _linked(own: Path, file: Path, descriptor: int) -> bool:
    """Whether `file` is now a second name of `own`."""
    try:
        os.link(own, file)
    except FileExistsError:
        return False
    except OSError as error:
        # NFS may lose the answer to a link that it has made.
        if os.fstat(descriptor).st_nlink == 2:
            return True
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return _renamed(own, file)  # a file system without links
    return True


def _renamed(own: Path, file: Path) -> bool:
    """As _linked, by two steps: a name is taken, then given its contents."""
    if not _made(file):
        return False
    own.rename(file)
    return True


def _made(file: Path) -> bool:
    """Whether an empty file could be made where none was; of several that try, one makes it."""
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL, 0o644))
    except FileExistsError:
        return False
    return True


def _identity(file: Path) -> tuple[int, int] | None:
    """What tells a file from a later one of the same name."""
    try:
        entry = os.lstat(file)
    except FileNotFoundError:
        return None
    return entry.st_ino, entry.st_mtime_ns


def _bytes(file: Path) -> bytes | None:
    """The file's beginning; None if there is none.

    Raises:
        _NoFile: something else has its name.
        OSError: it cannot be read.
    """
    try:
        descriptor = os.open(file, _READING)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
            raise _no_file(file) from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _no_file(file)
        return os.read(descriptor, _LENGTH)
    finally:
        os.close(descriptor)


def _no_file(file: Path) -> _NoFile:
    return _NoFile(errno.EEXIST, "it is no plain file; remove it", os.fspath(file))


def _parsed(data: bytes | None) -> Holder | None:
    try:
        return parse_json(data or b"", Holder, NAME, remedy="")
    except ValueError:  # not ours, or caught while it is being written
        return None


def _mark(data: bytes | None) -> str:
    """What tells one lock from another, whatever its count."""
    holder = _parsed(data)
    return holder.token if holder else repr(data)
