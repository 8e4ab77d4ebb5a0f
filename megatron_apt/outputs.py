"""Files that a command writes when its work is done (`--json`, `--picture`, ...): whether
they can be written is found before the work.
"""

import contextlib
import os
import stat
from collections.abc import Generator, Iterable
from pathlib import Path


def check(option: str, file: str | os.PathLike, suffixes: Iterable[str] = ()) -> None:
    """That `file` can be written; nothing is written yet. An empty name stands for no
    file.

    Args:
        suffixes: the kinds of file that `option` takes, such as `.png`; any if empty.

    Raises:
        ValueError: naming option, file and remedy.
    """
    name = os.fspath(file)
    if not name:
        return
    if trouble := _trouble(Path(name)):
        raise ValueError(f"{_shown(option, name)}: {trouble}")
    if (known := tuple(suffixes)) and not name.lower().endswith(known):
        raise ValueError(
            f"{_shown(option, name)}: ends with none of {', '.join(known)}, by which the kind of file is "
            "chosen; give such a name"
        )


def _trouble(file: Path) -> str:
    try:
        kind = file.stat().st_mode
    except FileNotFoundError:
        if file.is_symlink():
            return "a link to nothing; remove it, or give another name"
        return _folder_trouble(file.parent)
    except (OSError, ValueError) as error:
        return f"{getattr(error, 'strerror', None) or error}; give another name"
    if stat.S_ISDIR(kind):
        return f"is a folder; give the name of a file, for example {file / 'figures.json'}"
    if not (stat.S_ISREG(kind) or stat.S_ISCHR(kind)):
        return "is no plain file; give another name"
    return (
        "" if os.access(file, os.W_OK) else "may not be written; give another name, or change its permissions"
    )


def _folder_trouble(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}; make it first (mkdir -p), or give another name"
    return (
        ""
        if os.access(folder, os.W_OK | os.X_OK)
        else f"the folder {folder} may not be written to; give a name in another"
    )


def write(option: str, file: str | os.PathLike, text: str) -> None:
    """Writes a file that `check` has let pass. An empty name stands for no file.

    Raises:
        ValueError: naming option and file.
    """
    if not os.fspath(file):
        return
    with named_failure(option, file):
        Path(file).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def named_failure(option: str, file: str | os.PathLike) -> Generator[None]:
    """Raises ValueError, naming option and file, where the file cannot be written."""
    try:
        yield
    except OSError as error:
        remedy = "free disk space, or give another name"
        raise ValueError(
            f"{_shown(option, os.fspath(file))}: cannot be written ({error.strerror or error}); {remedy}"
        ) from None


def _shown(option: str, name: str) -> str:
    return f"{option}={name if len(name) <= 300 else name[:300] + '...'}"


def check_number(name: str, value: float, least: float, most: float) -> None:
    """That a number from outside lies in [least, most]; NaN lies nowhere.

    Raises:
        ValueError: naming it and both bounds.
    """
    if not least <= value <= most:
        raise ValueError(f"{name}={value}: must lie between {least:,} and {most:,}")
