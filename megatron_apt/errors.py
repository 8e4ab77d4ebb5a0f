"""Failures a user can act on: shown as one message, without a traceback."""


class BadLoss(RuntimeError):
    """A loss is not finite; names phase, branch, microbatch, rank and samples."""


class BadGradient(RuntimeError):
    """A gradient is not finite; names the network, and once it is known the parameter, rank and samples."""


class Collapse(RuntimeError):
    """Training shows a lasting sign of collapse."""


EXPECTED = (ValueError, FileNotFoundError, ImportError, BadLoss, BadGradient, Collapse)


def described(error: BaseException) -> str:
    """The error and its notes, which say in which action of the schedule it arose."""
    return " ".join((f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())))
