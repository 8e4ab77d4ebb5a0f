"""Datasets that were damaged or made up: every one is refused with file and field, before
it allocates or leads anywhere.
"""

import io
import json
import os
import resource
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from megatron_apt.data.shards import LatentShards
from megatron_apt.encode.command import encode
from megatron_apt.encode.config import EncodeConfig

COUNT = 6


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for i in range(COUNT):
        Image.new("RGB", (8, 8), (9, 40 * i, 9)).save(source / f"{i}.png")
        (source / f"{i}.txt").write_text(f"number {i}")
    output = tmp_path_factory.mktemp("encoded") / "out"
    encode(
        EncodeConfig(str(source), str(output), height=8, width=8, text_width=8, samples_per_shard=4),
        progress=False,
    )
    return output


@pytest.fixture
def folder(encoded, tmp_path):
    return Path(shutil.copytree(encoded, tmp_path / "data"))


def edit_info(folder: Path, **changes) -> None:
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**info, **changes}))


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def write_lines(folder: Path, lines: list) -> None:
    """An index as a damaged or older folder has it: without the digest that would refuse every change."""
    (folder / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    edit_info(folder, index_sha256=None)


def read_all(folder: Path) -> LatentShards:
    dataset = LatentShards(folder)
    for i in range(len(dataset)):
        dataset[i]
    return dataset


def refused(folder: Path, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_all(folder)


def test_an_older_index_still_reads(encoded, folder):
    write_lines(
        folder, [{key: value for key, value in line.items() if key != "crc32"} for line in lines_of(folder)]
    )
    old, new = read_all(folder), read_all(encoded)
    assert old.captions == new.captions and all(
        torch.equal(old[i].latent, new[i].latent) for i in range(COUNT)
    )
    info = json.loads((encoded / "dataset.json").read_text())
    assert len(info["index_sha256"]) == 64 and all(len(line["crc32"]) == 2 for line in lines_of(encoded))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"samples": 0}, r"samples=0, the dataset is empty"),
        ({"samples": "6"}, "dataset.json: samples: Expected int"),
        ({"samples": -1}, "dataset.json: samples"),
        ({"samples": 1e300}, "dataset.json: samples"),
        ({"samples": 7}, "6 samples, dataset.json says 7"),
        ({"codec": []}, "dataset.json: codec: Expected object"),
        ({"text_encoder": None}, "dataset.json: text_encoder"),
        ({"conditions": "../conditions.safetensors"}, "dataset.json: conditions"),
        ({"conditions": "/etc/passwd"}, "dataset.json: conditions"),
        ({"first_frame": {"channels": "x"}}, r"dataset.json: first_frame.channels"),
        ({"first_frame": {"channels": 4, "image": [1e9]}}, r"dataset.json: first_frame.image"),
        ({"format": [1]}, r"format=\[1\], this version reads"),
        ({"index_sha256": "0" * 64}, "index_sha256"),
    ],
)
def test_dataset_json_of_another_type(folder, changes, message):
    edit_info(folder, **changes)
    refused(folder, message)


@pytest.mark.parametrize("text", ["[]", "null", "7", '"x"', "{", "[" * 100_000, ""])
def test_dataset_json_that_is_none(folder, text):
    (folder / "dataset.json").write_text(text)
    refused(folder, "dataset.json: ")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("id", 5, r"index.jsonl:3: id=5, expected 2"),
        ("id", "2", r"index.jsonl:3: id: Expected int"),
        ("key", 3, r"index.jsonl:3: key"),
        ("key", "a/b", r"index.jsonl:3: key"),
        ("key", "00000000", r"index.jsonl:3: key='00000000' stands behind"),
        ("shard", "../shard-00000.tar", r"index.jsonl:3: shard"),
        ("shard", "/etc/passwd", r"index.jsonl:3: shard"),
        ("shard", "shard-00007.tar", r"shard-00007.tar does not exist|lines are swapped"),
        ("shard", "dataset.json", r"index.jsonl:3: shard='dataset.json' is no tar file"),
        ("latent", [1, 2], r"index.jsonl:3: latent"),
        ("latent", [512, -5], r"index.jsonl:3: latent"),
        ("latent", [512, 1e30], r"index.jsonl:3: latent"),
        ("latent", "x", r"index.jsonl:3: latent"),
        ("text", [512, 384], r"index.jsonl:3: offset 512"),
        ("latent_shape", [12, 1, 8], r"index.jsonl:3: latent_shape"),
        ("latent_shape", [0, 1, 8, 8], r"index.jsonl:3: latent_shape"),
        ("latent_shape", [10**9, 10**3, 10**3, 10**2], r"index.jsonl:3: latent_shape=\[1000000000"),
        ("latent_shape", [12, 1, 8, 9], r"index.jsonl:3: latent_shape"),
        ("text_length", 10**12, r"index.jsonl:3: text_length"),
        ("text_length", 1, r"shard-00000.tar, offset \d+: float32 \(\d, 8\)"),
        ("caption", None, r"index.jsonl:3: caption"),
        ("crc32", [1], r"index.jsonl:3: crc32"),
        ("crc32", [1, 2], r"shard-00000.tar, offset \d+: not what was written"),
    ],
)
def test_lines_of_the_index(folder, field, value, message):
    lines = lines_of(folder)
    lines[2][field] = value
    write_lines(folder, lines)
    refused(folder, message)


def test_lines_that_are_swapped_or_there_twice(folder):
    lines = lines_of(folder)
    for order in ([0, 2, 1, 3, 4, 5], [0, 1, 1, 3, 4, 5], [0, 1, 2, 3, 5, 4], [4, 5, 0, 1, 2, 3]):
        write_lines(folder, [lines[i] for i in order])
        refused(folder, r"index.jsonl:\d: id=")
        write_lines(folder, [{**lines[i], "id": n} for n, i in enumerate(order)])
        refused(folder, r"index.jsonl:\d: key=")
    # With keys and places exchanged too it is the tar file's own names that tell.
    places = [
        {**line, **{name: other[name] for name in ("latent", "crc32")}}
        for line, other in zip(lines, lines[1:] + lines[:1], strict=True)
    ]
    write_lines(folder, places)
    refused(folder, r"index.jsonl:\d: offset|holds .*, index.jsonl says")
    write_lines(folder, [{**line, "key": f"{int(line['key']) + 1:08d}"} for line in lines])
    refused(
        folder,
        r"shard-00000.tar, offset 512: holds .*00000000.latent.npy.*, index.jsonl says 00000001.latent.npy",
    )


def test_a_changed_array_is_noticed(folder):
    line = lines_of(folder)[4]
    file = folder / line["shard"]
    data = bytearray(file.read_bytes())
    data[sum(line["latent"]) - 2] ^= 1
    file.write_bytes(data)
    dataset = LatentShards(folder)
    assert dataset[3].caption == "number 3"
    with pytest.raises(
        ValueError, match=rf"shard-00001.tar, offset {line['latent'][0]}: not what was written there"
    ):
        dataset[4]


def replaced(folder: Path, array: bytes, sums: bool) -> None:
    """The first latent's bytes replaced by as many others, the index told or not."""
    lines = lines_of(folder)
    offset, size = lines[0]["latent"]
    assert len(array) <= size
    array = array.ljust(size, b"\0")
    data = bytearray((folder / "shard-00000.tar").read_bytes())
    data[offset : offset + size] = array
    (folder / "shard-00000.tar").write_bytes(data)
    for line in lines:
        if sums:
            line["crc32"][0] = zlib.crc32(array) if line["id"] == 0 else line["crc32"][0]
        else:
            del line["crc32"]
    write_lines(folder, lines)


def npy(shape: str, descr: str = "'<f4'", order: str = "False") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    "array",
    [
        npy("(1000000000000,)"),
        npy("(12, 1, 8, 8)", order="True"),
        npy("(12, 1, 8, 8)", descr="'|O'"),
        npy("(12, 1, 8, 8)", descr="'<f8'"),
        npy("(-12, 1, 8, 8)"),
        npy("(" * 50),
        npy("__import__('os').system('true')"),
        b"\x93NUMPY\x09\x00" + bytes(100),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"(" * 200,
        b"PK\x03\x04" + bytes(100),
        b"",
    ],
)
def test_headers_of_arrays_are_not_believed(folder, array):
    replaced(folder, array, sums=True)
    dataset = LatentShards(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"shard-00000.tar, offset 512: "):
        dataset[0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_arrays_without_sums_are_finite(folder):
    good = LatentShards(folder)[0].latent.numpy().copy()
    good[3, 0, 1, 2] = np.nan
    buffer = io.BytesIO()
    np.save(buffer, good)
    replaced(folder, buffer.getvalue(), sums=False)
    refused(folder, r"00000000.latent.npy holds NaN or infinity")


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_shards_cut_short_or_gone(folder, size):
    os.truncate(folder / "shard-00001.tar", size)
    refused(folder, f"shard-00001.tar is truncated: it ends at byte {size}")
    (folder / "shard-00001.tar").unlink()
    (folder / "shard-00001.tar").mkdir()
    refused(folder, r"shard-00001.tar")


def conditions(**changes) -> dict:
    tensors = {"null": torch.zeros(1, 8), "negative": torch.zeros(3, 8), **changes}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    "tensors, message",
    [
        (conditions(null=None), "needed are null and negative"),
        (conditions(negative=torch.zeros(3, 7)), r"negative is float32 \(3, 7\)"),
        (conditions(null=torch.zeros(8)), r"null is float32 \(8,\)"),
        (conditions(null=torch.zeros(0, 8)), r"null is float32 \(0, 8\)"),
        (conditions(null=torch.zeros(1, 8, dtype=torch.int64)), r"null is int64"),
        (conditions(negative=torch.full((3, 8), float("nan"))), "negative"),
        (conditions(null_pooled=torch.zeros(1, 5)), "both pooled or none"),
        (
            conditions(null_pooled=torch.zeros(2, 5), negative_pooled=torch.zeros(1, 5)),
            r"null_pooled is float32 \(2, 5\)",
        ),
    ],
)
def test_conditions_of_another_shape(folder, tensors, message):
    save_file(tensors, folder / "conditions.safetensors")
    refused(folder, f"conditions.safetensors: .*{message}")


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 8 + b"{}", (10**6).to_bytes(8, "little") + b"{}", b"x" * 500]
)
def test_conditions_that_are_none(folder, data):
    (folder / "conditions.safetensors").write_bytes(data)
    refused(folder, "conditions.safetensors: no readable safetensors file")


def test_text_encoders_stay_in_the_folder(folder):
    info = json.loads((folder / "dataset.json").read_text())
    for name in ("../tokenizer.model", "/etc/passwd", 5, None):
        edit_info(folder, text_encoder={**info["text_encoder"], "tokenizer": name})
        with pytest.raises(ValueError, match=r"text_encoder.tokenizer="):
            LatentShards(folder).text_encoder()
    edit_info(folder, text_encoder=info["text_encoder"])
    for data in (b"", b"\0" * 100, (folder / "tokenizer.model").read_bytes()[:500], os.urandom(500)):
        (folder / "tokenizer.model").write_bytes(data)
        with pytest.raises(ValueError, match=r"tokenizer.model"):
            LatentShards(folder).text_encoder()


def test_tar_files_that_lead_elsewhere_are_never_unpacked(folder, tmp_path):
    """Members are read by place. A tar file with others' names and links gives nothing,
    and nothing appears beside the folder.
    """
    names = sorted(path.name for path in tmp_path.rglob("*"))
    with tarfile.open(folder / "shard-00000.tar", "w") as tar:
        for i, name in enumerate(("../escaped.npy", "/absolute.npy", "00000000.latent.npy")):
            member = tarfile.TarInfo(name)
            if i == 2:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(member)
        large = tarfile.TarInfo("00000001.latent.npy")
        large.size = 0
        large.pax_headers = {"size": str(10 << 30)}
        tar.addfile(large)
    refused(folder, r"shard-00000.tar")
    assert sorted(path.name for path in tmp_path.rglob("*")) == names


def test_ours_are_plain_files_in_order(encoded):
    for file in sorted(encoded.glob("*.tar")):
        with tarfile.open(file) as tar:
            members = tar.getmembers()
        assert all(
            member.isreg() and "/" not in member.name and member.uid == member.gid == member.mtime == 0
            for member in members
        )
        assert [member.name for member in members] == sorted(
            (member.name for member in members), key=lambda name: name[:8]
        )


def test_a_damaged_done_file_is_named_and_a_lost_shard_is_encoded_again(encoded, tmp_path, monkeypatch):
    from megatron_apt.encode import command as encode_module

    settings = json.loads((encoded / "dataset.json").read_text())["settings"]
    config = EncodeConfig(
        settings["source"], str(tmp_path / "out"), height=8, width=8, text_width=8, samples_per_shard=4
    )
    original, calls = encode_module._encode_part, []

    def once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr(encode_module, "_encode_part", once)
    with pytest.raises(KeyboardInterrupt):
        encode(config, progress=False)
    done = tmp_path / "out" / "shard-00000.done"
    whole = done.read_bytes()
    for text in (
        b"",
        b"[]",
        b'{"index": 5}',
        whole[:-30],
        whole.replace(b'"latent": [', b'"latent": ["x", ', 1),
    ):
        done.write_bytes(text)
        with pytest.raises(ValueError, match=r"shard-00000.done: .*delete this file"):
            encode(config, progress=False)
    done.write_bytes(whole)
    (tmp_path / "out" / "shard-00000.tar").unlink()
    assert encode(config, progress=False)["samples"] == COUNT
    assert all((tmp_path / "out" / file.name).read_bytes() == file.read_bytes() for file in encoded.iterdir())
