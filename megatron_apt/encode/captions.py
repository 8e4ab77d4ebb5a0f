"""Captions: the text beside a file, or in a manifest's line, as one line of clean text;
bounded, and refused rather than guessed.
"""

import stat
from pathlib import Path

from megatron_apt.encode.folder import special
from megatron_apt.encode.rejected import RejectedInput
from megatron_apt.encode.written import AS_UTF8, UnreadableText, clean, decode_text
from megatron_apt.errors import shown

MOST_CAPTION = 64 << 10  # bytes: 10,000 words, while text encoders read a few hundred


def caption_of(path: Path, given: object) -> tuple[str, str]:
    """(caption, note) of an input: the one given, or without it the one in the .txt file
    of the same name beside it.

    Raises:
        RejectedInput: no caption, or one that is no text, too long or in an unknown
            encoding.
    """
    if given is not None and not isinstance(given, str):
        raise RejectedInput(path, "caption", given, "must be text")
    caption, note, found = _cleaned(path, given or "", "the caption"), "", ""
    if not caption:
        beside = _beside(path)
        if beside is not None:
            caption, note = _read(path, beside)
            found = f" (and {shown(beside.name)} is empty)"
    if not caption:
        remedy = (
            f"caption missing; write it in the manifest or in {shown(path.stem)}.txt beside the file{found}"
        )
        raise RejectedInput(path, "caption", "", remedy)
    return caption, note


def _beside(path: Path) -> Path | None:
    for suffix in (".txt", ".TXT"):
        try:
            beside = path.with_suffix(suffix)
            mode = beside.stat().st_mode
        except FileNotFoundError:
            continue
        except (OSError, ValueError):  # a name too long, a folder that may not be searched
            return None
        if not stat.S_ISREG(mode):
            raise RejectedInput(
                path,
                "caption",
                special(mode),
                f"{shown(beside.name)} is not a file; write the caption into one",
            )
        return beside
    return None


def _read(path: Path, beside: Path) -> tuple[str, str]:
    name = shown(beside.name)
    try:
        size = beside.stat().st_size
        if size > MOST_CAPTION:
            raise RejectedInput(
                path,
                "caption",
                f"{size} bytes",
                f"{name} is longer than a caption may be ({MOST_CAPTION} bytes); shorten it",
            )
        with open(beside, "rb") as file:
            data = file.read(MOST_CAPTION)
        text, encoding = decode_text(data)
    except UnreadableText as error:
        raise RejectedInput(
            path, "caption", str(error), f"{name} is in an unknown encoding; {AS_UTF8}"
        ) from None
    except OSError as error:
        raise RejectedInput(
            path,
            "caption",
            error.strerror or str(error),
            f"{name} cannot be read; give its rights or write it again",
        ) from None
    return _cleaned(
        path, text, name
    ), "" if encoding == "utf-8" else f"caption read as {encoding}; {AS_UTF8} to be sure of it"


def _cleaned(path: Path, text: str, name: str) -> str:
    try:
        caption = clean(text)
    except UnreadableText as error:
        raise RejectedInput(
            path, "caption", str(error), f"{name} is not plain text; write it again and {AS_UTF8}"
        ) from None
    size = len(caption.encode())
    if size > MOST_CAPTION:
        raise RejectedInput(
            path,
            "caption",
            f"{size} bytes",
            f"{name} is longer than a caption may be ({MOST_CAPTION} bytes); shorten it",
        )
    return caption
