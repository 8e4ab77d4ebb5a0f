"""The list of files to encode: from a folder, or from a .jsonl or .csv manifest. What
cannot be used is an entry too, with its problem.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_apt.encode.captions import caption_of
from megatron_apt.encode.folder import Found, Left, special, walk
from megatron_apt.encode.kinds import COMPANIONS, UNDECODED, suffix_of
from megatron_apt.encode.lines import bad_line, read_lines
from megatron_apt.encode.rejected import RejectedInput
from megatron_apt.encode.table import Row, read_csv
from megatron_apt.errors import shown

EXAMPLE = 'each line must be like {"path": "clip.mp4", "caption": "..."}'


@dataclass(frozen=True)
class Entry:
    """One file to encode.

    Attributes:
        start: seconds, or -1 for the run's own setting.
        fps: frames per second to sample at, or -1 for the run's own setting.
        problem: why the entry cannot be used, or None.
        size: in bytes, or None if there is no such file.
        note: what is worth knowing of it, or "".
    """

    path: Path
    caption: str
    start: float = -1.0
    fps: float = -1.0
    problem: RejectedInput | None = None
    size: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Entries:
    """All entries, in the manifest's order, or sorted by path for a folder; `left` are
    files of a folder that are no inputs.
    """

    entries: list[Entry]
    left: Left


def read_entries(source: str | Path, output: str | Path | None = None) -> Entries:
    """A manifest has columns path (relative to the manifest), caption, and optionally
    start and fps. A caption that is missing there, and every caption of a folder, is read
    from the .txt file of the same name beside the picture or video.

    Args:
        output: a folder inside the source that is not read.

    Raises:
        FileNotFoundError, ValueError: no source, a manifest that cannot be read, or
            nothing in it.
    """
    source = Path(source)
    try:
        mode = source.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{shown(source)} does not exist; give a folder, or a manifest ending in .jsonl or .csv"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{shown(source)}: {_reason(error)}; give a folder, or a manifest ending in .jsonl or .csv"
        ) from None
    if stat.S_ISDIR(mode):
        return _from_folder(source, output)
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"{shown(source)} is {special(mode)}; give a folder, or a manifest ending in .jsonl or .csv"
        )
    readers = {".jsonl": _read_jsonl, ".csv": read_csv}
    if suffix_of(source) not in readers:
        raise ValueError(f"{shown(source)}: unknown kind of manifest; use .jsonl or .csv, or give a folder")
    try:
        entries = [_entry_of_row(source, row) for row in readers[suffix_of(source)](source)]
    except OSError as error:
        raise ValueError(f"{shown(source)}: {_reason(error)}; the manifest cannot be read") from None
    if not entries:
        raise ValueError(f"{shown(source)}: no entries; give at least one line with path and caption")
    return Entries(entries, Left())


def _from_folder(source: Path, output: str | Path | None) -> Entries:
    try:
        found, left = walk(source, output)
    except OSError as error:
        raise ValueError(f"{shown(source)}: {_reason(error)}; give a folder that may be read") from None
    if not found:
        raise ValueError(
            f"{shown(source)}: no picture or video in it{left.described(', only ')}; docs/data.md lists the "
            "kinds that are decoded"
        )
    return Entries([_entry_found(one) for one in found], left)


def _entry_found(found: Found) -> Entry:
    if isinstance(found, RejectedInput):
        return Entry(Path(found.file), "", problem=found)
    return _entry(found, {})


def _read_jsonl(source: Path) -> Iterator[Row | RejectedInput]:
    """Rows, or for a line that is none its RejectedInput."""
    begun = False
    for line in read_lines(source):
        text = line.text.strip(" \t\r\n")
        if not text:
            continue
        if not begun and text.startswith("["):
            raise ValueError(
                f"{shown(source)}:{line.number}: a JSON array, not JSON Lines; {EXAMPLE} (jq -c '.[]' writes "
                "them)"
            )
        begun = True
        if line.problem:
            yield bad_line(source, line, line.problem)
            continue
        try:
            yield Row(line, _object(text))
        except _BadRow as error:
            yield bad_line(source, line, str(error))


class _BadRow(ValueError):
    pass


def _object(text: str) -> dict:
    try:
        row = json.loads(text, object_pairs_hook=_once)
    except _BadRow:
        raise
    except RecursionError:
        raise _BadRow(f"nested too deeply; {EXAMPLE}") from None
    except ValueError as error:
        raise _BadRow(f"not JSON ({error}); {EXAMPLE}") from None
    if not isinstance(row, dict) or not isinstance(row.get("path"), str):
        raise _BadRow(f'no field "path" with text; {EXAMPLE}')
    return row


def _once(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _BadRow(
            f"field {next(name for name in names if names.count(name) > 1)!r} is there twice; give it once"
        )
    return row


def _entry_of_row(source: Path, row: Row | RejectedInput) -> Entry:
    if isinstance(row, RejectedInput):
        return Entry(Path(f"{source}:{row.file.rpartition(':')[2]}"), "", problem=row)
    where = f"{source}:{row.line.number}"
    problem = _path_problem(row.fields["path"])
    if problem:
        return Entry(Path(where), "", problem=RejectedInput(where, "path", row.fields["path"], problem))
    entry = _entry(source.parent / row.fields["path"], row.fields)
    if entry.problem:
        found = entry.problem
        return replace(
            entry,
            problem=RejectedInput(
                found.file,
                found.field,
                found.value,
                f"{found.remedy} (line {row.line.number} of {source.name})",
            ),
        )
    return replace(entry, note=entry.note or row.line.note) if row.line.note else entry


def _path_problem(path: str) -> str | None:
    """Why text is no path of a file, or None."""
    if not path.strip():
        return "path is empty; name a file in every line"
    if re.match(r"(?!file://)[A-Za-z][A-Za-z0-9+.-]+://", path):
        return "addresses are not fetched; download the file and name where it lies"
    if path.startswith("file://"):
        return "give the path without file://"
    if any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in path):
        return "holds a control character or half of a surrogate pair; correct the manifest"
    return None


def _entry(path: Path, row: dict) -> Entry:
    size, problem = _size(path)
    suffix = suffix_of(path)
    if suffix in UNDECODED and size is not None:
        problem = RejectedInput(path, "kind", suffix, UNDECODED[suffix])
    if suffix in COMPANIONS:  # FFmpeg would draw some kinds of text as a video
        problem = RejectedInput(path, "kind", suffix, "text or metadata; name a picture or video")
    try:
        caption, note = caption_of(path, row.get("caption"))
        start, fps = _number(path, row, "start"), _number(path, row, "fps")
    except RejectedInput as rejected:
        return Entry(path, "", problem=problem or rejected, size=size)
    return Entry(path, caption, start, fps, problem, size, note)


def _size(path: Path) -> tuple[int | None, RejectedInput | None]:
    """Size of a file, or what is there instead. Of a file that is simply missing nothing
    is said: the decoders will.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        hint = _missing_hint(path)
        return None, RejectedInput(path, "path", "no such file", hint) if hint else None
    except (OSError, ValueError) as error:
        return None, RejectedInput(
            path, "path", _reason(error), "cannot be reached; give its rights or correct the manifest"
        )
    if not stat.S_ISREG(found.st_mode):
        return None, RejectedInput(
            path, "path", special(found.st_mode), "not a file; name a picture or video"
        )
    return found.st_size, None


def _missing_hint(path: Path) -> str:
    text = os.fspath(path)
    if path.is_symlink():
        return (
            f"a link to {shown(os.readlink(path))}, which is not there; put the file there or remove the link"
        )
    if "\\" in text:
        return "written with backslashes; write / between folders, and no drive letter"
    if text != text.strip():
        return "the name ends with a space; correct the manifest"
    if "/~" in text or text.startswith("~"):
        return "~ is not expanded in a manifest; write the folder out"
    return ""


def _number(path: Path, row: dict, field: str) -> float:
    value = row.get(field)
    if value is None or (isinstance(value, str) and not value.strip()):
        return -1.0
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise RejectedInput(path, field, value, "must be a number >= 0, or left out")
    return number


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
