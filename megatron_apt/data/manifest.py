"""The list of files to encode: from a folder, or from a .jsonl or .csv manifest."""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path

from megatron_apt.data.kinds import MEDIA_SUFFIXES, suffix_of
from megatron_apt.data.rejected import RejectedInput


@dataclass(frozen=True)
class Entry:
    """One file to encode.

    Attributes:
        start: seconds, or -1 for the run's own setting.
        fps: frames per second to sample at, or -1 for the run's own setting.
        problem: why the entry cannot be used, or None.
    """

    path: Path
    caption: str
    start: float = -1.0
    fps: float = -1.0
    problem: RejectedInput | None = None


def read_entries(source: str | Path) -> list[Entry]:
    """All entries, in the manifest's order, or sorted by path for a folder.

    A manifest has columns path (relative to the manifest), caption, and optionally start and fps. A caption that is missing there, and every caption
    of a folder, is read from the .txt file of the same name beside the picture or video.

    Raises:
        FileNotFoundError, ValueError: no source, a manifest that cannot be read, or nothing in it.
    """
    source = Path(source)
    if source.is_dir():
        files = sorted(p for p in source.rglob("*") if suffix_of(p) in MEDIA_SUFFIXES)
        entries = [_entry(path, {}) for path in files]
        if not entries:
            raise ValueError(f"{source}: no picture or video in it; known suffixes are {', '.join(sorted(MEDIA_SUFFIXES))}")
        return entries
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist; give a folder, or a manifest ending in .jsonl or .csv")
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv}
    if source.suffix.lower() not in readers:
        raise ValueError(f"{source}: unknown kind of manifest; use .jsonl or .csv, or give a folder")
    entries = [_entry(source.parent / row["path"], row) for row in readers[source.suffix.lower()](source)]
    if not entries:
        raise ValueError(f"{source}: no entries; give at least one line with path and caption")
    return entries


def _read_jsonl(source: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}:{number}: not JSON ({error}); each line must be one object with path and caption") from None
        if not isinstance(row, dict) or not isinstance(row.get("path"), str):
            raise ValueError(f'{source}:{number}: no field "path"; each line must be like {{"path": "clip.mp4", "caption": "..."}}')
        rows.append(row)
    return rows


def _read_csv(source: Path) -> list[dict]:
    with open(source, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if "path" not in (reader.fieldnames or ()):
            raise ValueError(f"{source}:1: columns {reader.fieldnames}; the first line must name path and caption (and may name start, fps)")
        rows = list(reader)
    for number, row in enumerate(rows, 2):
        if not row["path"]:
            raise ValueError(f"{source}:{number}: path is empty; name a file in every line")
    return rows


def _entry(path: Path, row: dict) -> Entry:
    try:
        caption = _caption(path, row)
        return Entry(path, caption, _number(path, row, "start"), _number(path, row, "fps"))
    except RejectedInput as rejected:
        return Entry(path, "", problem=rejected)


def _caption(path: Path, row: dict) -> str:
    caption = row.get("caption") or ""
    if not isinstance(caption, str):
        raise RejectedInput(path, "caption", caption, "must be text")
    beside = path.with_suffix(".txt")
    if not caption.strip() and beside.is_file():
        caption = beside.read_text(encoding="utf-8", errors="replace")
    caption = " ".join(caption.split())
    if not caption:
        raise RejectedInput(path, "caption", "", f"caption missing; write it in the manifest or in {beside.name} beside the file")
    return caption


def _number(path: Path, row: dict, field: str) -> float:
    value = row.get(field)
    if value is None or value == "":
        return -1.0
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise RejectedInput(path, field, value, "must be a number >= 0, or left out")
    return number
