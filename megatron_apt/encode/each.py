"""Decoding of many files in which no file disturbs another: whatever a decoder throws
rejects its file, what it prints becomes notes.
"""

import contextlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Generator, Sequence

from torch import Tensor

from megatron_apt.encode.decode import Clip, decode_clips
from megatron_apt.encode.notes import Notes
from megatron_apt.encode.rejected import RejectedInput

MOST_PRINTED = 1 << 20  # bytes of what decoders print that are looked at


def decode_all(clips: Sequence[Clip], device: str, notes: Notes) -> list[Tensor | RejectedInput]:
    """Like decode_clips. Where that fails as a whole, each file is tried alone and a
    failure is that file's.
    """
    try:
        with _printed() as lines:
            results = decode_clips(clips, device, notes)
    except Exception as error:
        if len(clips) > 1:
            return [result for clip in clips for result in decode_all([clip], device, notes)]
        text = f"{type(error).__name__}: {error}"
        return [
            RejectedInput(
                clips[0].path, "decoder", text, "the decoder fails on this file; re-encode it or remove it"
            )
        ]
    if lines:
        _note(clips, lines, notes)
    return results


def _note(clips: Sequence[Clip], lines: list[str], notes: Notes) -> None:
    """Libraries print without naming the file, so that the note is of all that were decoded together."""
    where = (
        clips[0].path
        if len(clips) == 1
        else f"{len(clips)} files decoded together, the first {clips[0].path}"
    )
    for line, count in sorted(Counter(lines).items()):
        notes.add(where, f"a decoder printed: {line}" + (f" ({count} times)" if count > 1 else ""))


@contextlib.contextmanager
def _printed() -> Generator[list[str]]:
    """Lines that C libraries write to the error stream meanwhile, without addresses; they
    appear in the list at the end.

    The stream belongs to the process: what other threads write meanwhile is taken for the
    decoders' too.
    """
    lines: list[str] = []
    try:
        before = os.dup(2)
    except OSError:  # a process without an error stream
        yield lines
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(before, 2)
            os.close(before)
        file.seek(0)
        text = file.read(MOST_PRINTED).decode(errors="replace")
    stripped = (re.sub(r" ?@ ?(0x)?[0-9a-f]{6,}", "", line).strip() for line in text.splitlines())
    lines += [line for line in stripped if line]
