"""The writer of a dataset: shard by shard, so that an interrupted encoding continues; the
layout is told in shards.py.
"""

import contextlib
import errno
import hashlib
import io
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import Tensor

from megatron_apt.data.encoding import CONDITIONS, TOKENIZER
from megatron_apt.data.index import ARRAYS, FORMAT, INDEX, POOLED_FORMAT, read_done, read_info
from megatron_apt.encode.rejected import RejectedInput
from megatron_apt.errors import shown
from megatron_apt.files import Replacement, write_atomically
from megatron_apt.lock import FolderLock
from megatron_apt.schema import read_json


class EncodeStopped(ValueError):
    """Encoding cannot go on; what is finished is kept and a rerun continues from it."""


class ShardWriter:
    """Writes a dataset by shards, so that an interrupted encoding continues.

    Args:
        settings: what the bytes depend on, as JSON values. A folder begun with other
            settings is refused.
        lock: asked before anything is committed whether the folder is still this
            process's.

    Attributes:
        finished: contents of dataset.json if the folder is complete already, else None.

    Raises:
        ValueError: other settings (naming the first that differs), or a folder with
            foreign files.
    """

    def __init__(self, folder: str | Path, settings: dict, lock: FolderLock | None = None):
        self.folder, self.settings, self._lock = Path(folder), json.loads(json.dumps(settings)), lock
        self.finished = finished_dataset(self.folder, self.settings)
        if self.finished is None:
            with _output_usable(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            if _earlier(self.folder) != self.settings:
                self._begin()

    def _begin(self) -> None:
        """Also anew, where the inputs have been mended before anything was encoded."""
        with output_named(self.folder):
            (self.folder / TOKENIZER).unlink(missing_ok=True)
        self.commit("encode.json", _json_bytes(self.settings))

    def done(self, shard: int) -> dict | None:
        """{"index": [...], "rejected": [...], "notes": [...]} of a finished shard, else None."""
        file = self.folder / f"shard-{shard:05d}.done"
        if not file.is_file():
            return None
        done, tar = read_done(file), self.folder / f"shard-{shard:05d}.tar"
        end = max((sum(line["meta"]) for line in done["index"]), default=0)
        # Without its tar file it is not finished
        return done if tar.is_file() and tar.stat().st_size >= end else None

    @contextlib.contextmanager
    def shard(self, number: int) -> Generator["OpenShard"]:
        """Opens a shard: leaving the block commits it, an exception leaves nothing.

        Raises:
            EncodeStopped: it cannot be written.
        """
        name = f"shard-{number:05d}.tar"
        with output_named(self.folder):
            file = Replacement(self.folder / name)
        with file:
            tar = tarfile.open(fileobj=file.stream, mode="w", format=tarfile.USTAR_FORMAT)
            opened = OpenShard(name, tar, self.folder)
            yield opened
            with output_named(self.folder):
                opened.close()
                file.flush()
                self._check_lock()
                file.commit()
            self.commit(f"shard-{number:05d}.done", _json_bytes(opened.done))

    def finish(
        self,
        shards: int,
        codec: dict,
        text_encoder: dict,
        conditions: dict[str, Tensor],
        first_frame: dict | None = None,
        notes: Sequence[dict] = (),
    ) -> tuple[dict, list[dict]]:
        """Writes index, conditions (named as in the file), rejected.jsonl, notes.jsonl if
        there are any and, last, dataset.json.

        Returns its contents and all notes.

        Args:
            first_frame: "channels" of given, and "image" (shape of its tokens) and
                "image_encoder" if there is one; None: no first frames.
            notes: of the source as a whole; they stand before those of its files.
        """
        parts = [part for number in range(shards) if (part := self.done(number))]
        assert len(parts) == shards
        lines_of_all = (line for part in parts for line in part["index"])
        index: list[dict[str, Any]] = [{"id": i, **line} for i, line in enumerate(lines_of_all)]
        rejected = [line for part in parts for line in part["rejected"]]
        notes = [*notes, *(line for part in parts for line in part["notes"])]
        info = {
            "format": POOLED_FORMAT if "null_pooled" in conditions else FORMAT,
            "samples": len(index),
            "rejected": len(rejected),
            "shapes": dict(
                sorted(Counter("x".join(map(str, line["latent_shape"])) for line in index).items())
            ),
            "codec": codec,
            "text_encoder": text_encoder,
            "conditions": CONDITIONS,
            **({} if first_frame is None else {"first_frame": first_frame}),
            "settings": self.settings,
            "index_sha256": hashlib.sha256(lines := _jsonl_bytes(index)).hexdigest(),
        }
        self.commit(INDEX, lines)
        self.write_rejected(rejected)
        if notes:
            self.commit("notes.jsonl", _jsonl_bytes(notes))
        self.commit(CONDITIONS, save({name: value.contiguous() for name, value in conditions.items()}))
        self.commit("dataset.json", _json_bytes(info))
        for number in range(shards):
            (self.folder / f"shard-{number:05d}.done").unlink(missing_ok=True)
        (self.folder / "encode.json").unlink(missing_ok=True)
        return info, notes

    def write_rejected(self, rejected: list[dict]) -> None:
        self.commit("rejected.jsonl", _jsonl_bytes(rejected))

    def commit(self, name: str, data: bytes) -> None:
        """Writes a file so that a crash leaves the old one or the new one, whole."""
        self._check_lock()
        with output_named(self.folder):
            write_atomically(self.folder / name, data)

    def _check_lock(self) -> None:
        if self._lock is not None:
            self._lock.check()


def finished_dataset(folder: Path, settings: dict) -> dict | None:
    """The contents of dataset.json if the folder is complete already; None if it is new,
    or was begun with these settings. Writes nothing.

    Raises:
        ValueError: other settings (naming the first that differs), or a folder with
            foreign files.
    """
    names: set[str] = set()
    with _output_usable(folder), contextlib.suppress(FileNotFoundError):
        names = {entry.name for entry in folder.iterdir()}
    if "dataset.json" in names:
        info = read_info(folder)
        _compare(folder, info["settings"], settings)
        return info
    earlier = _earlier(folder)
    if earlier is None and any(not name.startswith(".lock") for name in names):
        raise ValueError(
            f"{shown(folder)} is not empty and was not begun by `megatron-apt encode`; give an empty or new "
            "folder as output"
        )
    mended = {**(earlier or {}), "entries": None} == {**settings, "entries": None} and not any(
        name.endswith(".done") for name in names
    )
    if earlier is not None and not mended:
        _compare(folder, earlier, settings)
    return None


def _earlier(folder: Path) -> dict | None:
    """The settings that the folder was begun with."""
    file = folder / "encode.json"
    return read_json(file, dict, remedy="delete the folder and encode again") if file.is_file() else None


def _compare(folder: Path, earlier: dict, settings: dict) -> None:
    for field in dict.fromkeys((*earlier, *settings)):
        before, now = earlier.get(field), settings.get(field)
        if before != now:
            raise ValueError(
                f"{shown(folder)}: was begun with {field}={before!r}, now {field}={now!r}; give the same "
                "settings, another output folder, or delete this one"
            )


class OpenShard:
    """A tar file being written; `index`, `rejected` and `notes` gather its lines."""

    def __init__(self, name: str, tar: tarfile.TarFile, folder: Path):
        self.name, self.index, self.rejected, self.notes = name, [], [], []
        self._tar, self._folder = tar, folder

    @property
    def done(self) -> dict:
        """What ShardWriter.done gives of it once it is committed."""
        return {"index": self.index, "rejected": self.rejected, "notes": self.notes}

    def close(self) -> None:
        """Writes the end of the tar file."""
        self._tar.close()

    def add(
        self, key: str, latent: Tensor, text: Tensor, caption: str, meta: dict, **others: Tensor | None
    ) -> None:
        """Appends a sample; key is its unique name, without dots (WebDataset cuts names
        at the first), `others` are further arrays of ARRAYS.
        """
        line: dict[str, Any] = {"key": key, "shard": self.name}
        sums: dict[str, int] = {}
        for name, array in {"latent": latent, "text": text, **others}.items():
            if array is not None:
                data = _npy_bytes(array)
                sums[name] = zlib.crc32(data)
                line[name] = self._member(f"{key}.{name}.npy", data)
        line["meta"] = self._member(f"{key}.json", _json_bytes({"key": key, "caption": caption, **meta}))
        self.index.append(
            {**line, "latent_shape": list(latent.shape), "text_length": len(text), "caption": caption}
        )
        self.index[-1]["crc32"] = [sums[name] for name in ARRAYS if name in sums]

    def reject(self, rejected: RejectedInput) -> None:
        self.rejected.append(rejected.as_dict())

    def _member(self, name: str, data: bytes) -> list[int]:
        # Time, owner and mode are constants, so the same samples give the same bytes
        header = tarfile.TarInfo(name)
        header.size = len(data)
        offset = self._tar.offset + tarfile.BLOCKSIZE
        with output_named(self._folder):
            self._tar.addfile(header, io.BytesIO(data))
        return [offset, len(data)]


@contextlib.contextmanager
def output_named(folder: Path) -> Generator[None]:
    """Turns what the system says while the output is written (disk full, read-only,
    deleted meanwhile) into EncodeStopped with folder and remedy.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "finished shards are kept, free some space and run the same command again"
            raise EncodeStopped(f"{shown(folder)}: disk full ({error.strerror}); {remedy}") from None
        remedy = (
            "was it deleted, or made read-only? Finished shards that are still there are kept; mend it and "
            "run the same command again"
        )
        raise EncodeStopped(
            f"{shown(folder)}: the output cannot be written ({error.strerror or error}); {remedy}"
        ) from None


@contextlib.contextmanager
def _output_usable(folder: Path) -> Generator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"output={shown(folder)} is, or lies behind, a file; give a folder") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EncodeStopped(f"{shown(folder)}: disk full ({error.strerror}); free some space") from None
        raise ValueError(
            f"output={shown(folder)} cannot be made or read ({error.strerror or error}); give a folder that "
            "you may write"
        ) from None


def _npy_bytes(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(
        buffer, tensor.detach().cpu().contiguous().numpy().astype(np.float32, copy=False), allow_pickle=False
    )
    return buffer.getvalue()


def _json_bytes(value: dict) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def _jsonl_bytes(lines: list[dict]) -> bytes:
    return b"".join(map(_json_bytes, lines))
