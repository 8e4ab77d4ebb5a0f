"""Failures a user can act on: shown as one message, without a traceback."""

import errno
import os
import select
import sys
import unicodedata


class BadLoss(RuntimeError):
    """A loss is not finite; names phase, branch, microbatch, rank and samples."""


class BadGradient(RuntimeError):
    """A gradient is not finite; names the network, and once it is known the parameter, rank and samples."""


class Collapse(RuntimeError):
    """Training shows a lasting sign of collapse."""


EXPECTED = (ValueError, OSError, ImportError, MemoryError, BadLoss, BadGradient, Collapse)

REMEDIES = {
    errno.ENOSPC: "free disk space and start the command again",
    errno.EDQUOT: "your quota is used up: free disk space and start the command again",
    errno.EFBIG: "the file system takes no larger file; give a place on another",
    errno.EROFS: "nothing can be written there; give a place on another disk",
    errno.EACCES: "check the permissions of the file and of its folder, or give another",
    errno.EPERM: "check the permissions of the file and of its folder, or give another",
    errno.ENOENT: "check the spelling, and that the folder is there",
    errno.EISDIR: "it is a folder; give a file",
    errno.ENOTDIR: "a part of this path is a file, where a folder is needed; give another",
    errno.EEXIST: "there is a file of that name, where a folder is needed; give another",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its links lead in a circle; give the file itself",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "the machine has too many files open; close some",
    errno.EIO: "the disk or its connection fails; check it, or give a place on another",
    errno.ESTALE: "the network disk has lost it; start the command again",
    errno.ETXTBSY: "another program uses it; wait until that has ended",
    errno.ENOMEM: "the machine has too little memory left",
}

LOST = 70  # exit code of ranks that stop because of another (EX_SOFTWARE)
_DISTRIBUTED = ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError")

_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory: you tried to allocate",
    "CUDA out of memory",
    "std::bad_alloc",
)


def require(condition: bool, field: str, value: object, remedy: str) -> None:
    """Raises ValueError with the field, its value and the remedy, unless the condition holds."""
    if not condition:
        raise ValueError(f"{field}={value!r}: {remedy}")


def shown(name: str | os.PathLike) -> str:
    r"""A name as printable UTF-8: bytes that are not UTF-8 and control characters are
    written \xNN, everything else as it is.
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace") if isinstance(name, os.PathLike) else name
    if text.isprintable():
        return text
    return "".join(_escaped(c) if _is_control(c) else c for c in text)


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _escaped(character: str) -> str:
    code = ord(character)
    code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code  # how Python keeps a byte that is not UTF-8
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def is_expected(error: BaseException) -> bool:
    """Whether a user can cause it, so that it is shown without a traceback."""
    return isinstance(error, EXPECTED) or out_of_memory(error)


def out_of_memory(error: BaseException) -> bool:
    """Python's or torch's, on the CPU (where it is a plain RuntimeError) or a GPU."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
    )


def is_lost_rank(error: BaseException) -> bool:
    """Whether it is that of a collective, or of the rendezvous store, whose other end
    died or does not answer.
    """
    if not isinstance(error, RuntimeError):
        return False
    if isinstance(error, BadLoss | BadGradient | Collapse) or out_of_memory(error):
        return False
    return type(error).__name__ in _DISTRIBUTED or any(
        word in str(error).lower() for word in ("gloo", "nccl", "tcpstore")
    )


def described(error: BaseException) -> str:
    """The error and its notes, which say in which action of the schedule it arose."""
    return " ".join((_sentence(error), *getattr(error, "__notes__", ())))


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return described_os_error(error)
    if out_of_memory(error):
        text = str(error).splitlines()[0] if str(error) else "no more could be had"
        return f"out of memory: {text}; take a smaller size or micro_batch, or a machine with more"
    return f"{type(error).__name__}: {error}"


def described_os_error(error: OSError) -> str:
    """`path: reason; remedy`, of an error that the operating system gave."""
    places = " -> ".join(_shown(name) for name in (error.filename, error.filename2) if name is not None)
    code = error.errno or 0
    reason = error.strerror or os.strerror(code)
    remedy = REMEDIES.get(code, "")
    return f"{places or type(error).__name__}: {reason}" + (f"; {remedy}" if remedy else "")


def _shown(name: int | str | bytes | os.PathLike) -> str:
    if isinstance(name, int):
        return {0: "standard input", 1: "standard output", 2: "standard error"}.get(
            name, f"file descriptor {name}"
        )
    return ascii(os.fspath(name))[1:-1] if _unprintable(os.fsdecode(name)) else os.fsdecode(name)


def _unprintable(text: str) -> bool:
    return not text.replace(" ", "").isprintable()


def check_input_file(field: str, path: str) -> None:
    """Finds before the work begins that a file cannot be read.

    Raises:
        ValueError: naming field and path.
    """
    if not os.path.isfile(path):
        what = "is not a file" if os.path.exists(path) else "does not exist"
        raise ValueError(f"{field}={path!r}: {what}; give another")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{field}={path!r}: cannot be read; check its permissions, or give another")


def check_output_folder(field: str, path: str) -> None:
    """Finds before the work begins that a folder cannot be made or written to. Makes
    nothing.

    Raises:
        ValueError: naming field and path.
    """
    if not path.strip() or "\0" in path:
        raise ValueError(f"{field}={path!r}: give the name of a folder")
    place = os.path.abspath(path)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise ValueError(f"{field}={path!r}: {place} is not a folder; give another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(
            f"{field}={path!r}: {place} cannot be written to; check its permissions, or give another"
        )


def standard_output_is_closed(error: BaseException) -> bool:
    """Whether whoever read our output (`| head`) has left, which `error` tells of."""
    if isinstance(error, SystemExit):  # as which rich passes it on
        return isinstance(error.__context__, BrokenPipeError)
    if not isinstance(error, BrokenPipeError):
        return False
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # there is none, or it is no file
        return False
    poll = select.poll()
    poll.register(output, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
