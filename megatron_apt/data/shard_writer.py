"""The writer of a dataset: shard by shard, so that an interrupted encoding continues; the layout is told in shards.py."""

import contextlib
import errno
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import save
from torch import Tensor

from megatron_apt.data.rejected import RejectedInput, shown
from megatron_apt.data.shards import CONDITIONS, FORMAT, POOLED_FORMAT, TOKENIZER, read_info
from megatron_apt.schema import read_json


class EncodeStopped(ValueError):
    """Encoding cannot go on; what is finished is kept and a rerun continues from it."""


class ShardWriter:
    """Writes a dataset shard by shard, so that an interrupted encoding continues where it was.

    Args:
        settings: what the bytes depend on, as JSON values. A folder begun with other settings is refused.

    Attributes:
        finished: contents of dataset.json if the folder is complete already, else None.

    Raises:
        ValueError: other settings (naming the first that differs), or a folder with foreign files.
    """

    def __init__(self, folder: str | Path, settings: dict):
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings))
        self.finished: dict | None = None
        with _output_usable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            empty = not any(self.folder.iterdir())
        if (self.folder / "dataset.json").is_file():
            self.finished = read_info(self.folder)
            self._compare(self.finished["settings"])
        elif (self.folder / "encode.json").is_file():
            earlier = read_json(self.folder / "encode.json", dict, remedy="delete the folder and encode again")
            if any(self.folder.glob("shard-*.done")) or not self._other_entries(earlier):
                self._compare(earlier)
            else:
                self._begin()
        elif not empty:
            raise ValueError(f"{shown(self.folder)} is not empty and was not begun by `megatron-apt encode`; give an empty or new folder as output")
        else:
            self._begin()

    def _begin(self) -> None:
        """Also anew, where the inputs have been mended before anything was encoded."""
        with output_named(self.folder):
            (self.folder / TOKENIZER).unlink(missing_ok=True)
        self.commit("encode.json", _json_bytes(self.settings))

    def _other_entries(self, earlier: dict) -> bool:
        return {**earlier, "entries": None} == {**self.settings, "entries": None}

    def _compare(self, earlier: dict) -> None:
        for field in dict.fromkeys((*earlier, *self.settings)):
            before, now = earlier.get(field), self.settings.get(field)
            if before != now:
                raise ValueError(
                    f"{shown(self.folder)}: was begun with {field}={before!r}, now {field}={now!r}; "
                    "give the same settings, another output folder, or delete this one"
                )

    def done(self, shard: int) -> dict | None:
        """{"index": [...], "rejected": [...], "notes": [...]} of a finished shard, else None."""
        file = self.folder / f"shard-{shard:05d}.done"
        if not file.is_file():
            return None
        return {"notes": [], **json.loads(file.read_text(encoding="utf-8"))}

    @contextlib.contextmanager
    def shard(self, number: int) -> Iterator["OpenShard"]:
        """Opens a shard; leaving the block commits it, an exception leaves nothing behind.

        Raises:
            EncodeStopped: it cannot be written.
        """
        name = f"shard-{number:05d}.tar"
        temporary = self.folder / f"{name}.tmp"
        with output_named(self.folder):
            file = open(temporary, "wb")
        try:
            opened = OpenShard(name, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT), self.folder)
            yield opened
            with output_named(self.folder):
                opened.close()
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, self.folder / name)
            self.commit(f"shard-{number:05d}.done", _json_bytes(opened.done))
        finally:
            with contextlib.suppress(OSError):  # what is still to be written fails once more on a full disk
                file.close()
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def finish(
        self,
        shards: int,
        codec: dict,
        text_encoder: dict,
        conditions: dict[str, Tensor],
        first_frame: dict | None = None,
        notes: Sequence[dict] = (),
    ) -> tuple[dict, list[dict]]:
        """Writes index, conditions (named as in the file), rejected.jsonl, notes.jsonl if there are any and, last, dataset.json.

        Returns its contents and all notes.

        Args:
            first_frame: "channels" of given, and "image" (shape of its tokens) and "image_encoder" if there is one; None: no first frames.
            notes: of the source as a whole; they stand before those of its files.
        """
        parts = [self.done(number) for number in range(shards)]
        index = [{"id": i, **line} for i, line in enumerate(line for part in parts for line in part["index"])]
        rejected = [line for part in parts for line in part["rejected"]]
        notes = [*notes, *(line for part in parts for line in part["notes"])]
        info = {
            "format": POOLED_FORMAT if "null_pooled" in conditions else FORMAT,
            "samples": len(index),
            "rejected": len(rejected),
            "shapes": dict(sorted(Counter("x".join(map(str, line["latent_shape"])) for line in index).items())),
            "codec": codec,
            "text_encoder": text_encoder,
            "conditions": CONDITIONS,
            **({} if first_frame is None else {"first_frame": first_frame}),
            "settings": self.settings,
        }
        self.commit("index.jsonl", _jsonl_bytes(index))
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
        temporary = self.folder / f"{name}.tmp"
        with output_named(self.folder):
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.folder / name)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
            directory = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


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

    def add(self, key: str, latent: Tensor, text: Tensor, caption: str, meta: dict, **others: Tensor | None) -> None:
        """Appends a sample; key is its unique name, without dots (WebDataset cuts names at the first), `others` are further arrays of ARRAYS."""
        line = {"key": key, "shard": self.name}
        for name, array in {"latent": latent, "text": text, **others}.items():
            if array is not None:
                line[name] = self._member(f"{key}.{name}.npy", _npy_bytes(array))
        line["meta"] = self._member(f"{key}.json", _json_bytes({"key": key, "caption": caption, **meta}))
        self.index.append({**line, "latent_shape": list(latent.shape), "text_length": len(text), "caption": caption})

    def reject(self, rejected: RejectedInput) -> None:
        self.rejected.append(rejected.as_dict())

    def _member(self, name: str, data: bytes) -> list[int]:
        header = tarfile.TarInfo(name)  # time, owner and mode are constants, so the same samples give the same bytes
        header.size = len(data)
        offset = self._tar.offset + tarfile.BLOCKSIZE
        with output_named(self._folder):
            self._tar.addfile(header, io.BytesIO(data))
        return [offset, len(data)]


@contextlib.contextmanager
def output_named(folder: Path) -> Iterator[None]:
    """Turns what the system says while the output is written (disk full, read-only, deleted meanwhile) into EncodeStopped with folder and remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "finished shards are kept, free some space and run the same command again"
            raise EncodeStopped(f"{shown(folder)}: disk full ({error.strerror}); {remedy}") from None
        remedy = "was it deleted, or made read-only? Finished shards that are still there are kept; mend it and run the same command again"
        raise EncodeStopped(f"{shown(folder)}: the output cannot be written ({error.strerror or error}); {remedy}") from None


@contextlib.contextmanager
def _output_usable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"output={shown(folder)} is, or lies behind, a file; give a folder") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EncodeStopped(f"{shown(folder)}: disk full ({error.strerror}); free some space") from None
        raise ValueError(f"output={shown(folder)} cannot be made or read ({error.strerror or error}); give a folder that you may write") from None


def _npy_bytes(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tensor.detach().cpu().contiguous().numpy().astype(np.float32, copy=False), allow_pickle=False)
    return buffer.getvalue()


def _json_bytes(value: dict) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def _jsonl_bytes(lines: list[dict]) -> bytes:
    return b"".join(map(_json_bytes, lines))
