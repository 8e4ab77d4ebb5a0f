"""What is worth knowing of an input that became a sample all the same: the lines of notes.jsonl."""

from pathlib import Path

from megatron_apt.errors import shown


class Notes:
    """Gathers notes of several threads; each is kept once."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], None] = {}

    def add(self, file: str | Path, note: str) -> None:
        """`note` is one plain sentence without the file's name, e.g. "tone-mapped from PQ"."""
        self._found[shown(file), shown(note)] = None

    def lines(self) -> list[dict[str, str]]:
        """{"file", "note"} in the order of files and notes, whichever thread was first."""
        return [{"file": file, "note": note} for file, note in sorted(self._found)]
