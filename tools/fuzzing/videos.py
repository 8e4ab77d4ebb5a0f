"""Damaged clips: bytes, boxes and chunks of containers, codecs that nobody knows."""

import random
from pathlib import Path

from fuzzing import encoding
from fuzzing.boundary import Boundary, Input, Outcome
from fuzzing.media import write_clips
from fuzzing.mutate import beside_marker, bytes_damage

_BOXES = (
    *(
        b"ftyp",
        b"moov",
        b"mvhd",
        b"trak",
        b"tkhd",
        b"edts",
        b"elst",
        b"mdia",
        b"mdhd",
        b"hdlr",
        b"minf",
        b"stbl",
        b"mdat",
        b"pasp",
        b"colr",
    ),
    *(
        b"stsd",
        b"stts",
        b"ctts",
        b"stss",
        b"stsc",
        b"stsz",
        b"stco",
        b"avc1",
        b"mp4v",
        b"jpeg",
        b"avcC",
        b"esds",
    ),
)
_CHUNKS = (
    *(
        b"RIFF",
        b"AVI ",
        b"hdrl",
        b"avih",
        b"strl",
        b"strh",
        b"strf",
        b"movi",
        b"00dc",
        b"idx1",
        b"FLV",
        b"GIF89a",
        b"NETSCAPE2.0",
    ),
    # EBML: header, segment, info, tracks, cluster, cues, video, width
    *(
        b"\x1a\x45\xdf\xa3",
        b"\x18\x53\x80\x67",
        b"\x15\x49\xa9\x66",
        b"\x16\x54\xae\x6b",
        b"\x1f\x43\xb6\x75",
        b"\x1c\x53\xbb\x6b",
    ),
    *(b"\xe0", b"\xb0"),
)
_CODECS = (
    b"avc1",
    b"mp4v",
    b"jpeg",
    b"V_MPEG4/ISO/AVC",
    b"V_FFV1",
    b"V_VP9",
    b"V_VP8",
    b"FMP4",
    b"MJPG",
    b"WMV2",
    b"h264",
)


def _prepare(valid: Path) -> None:
    write_clips(valid / "clips")
    encoding.write_tokenizer(valid / "tokenizer.model")


def _other_codec(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    found = [codec for codec in _CODECS if codec in data]
    if not found:
        return bytes_damage(rng, data)
    old = rng.choice(found)
    new = rng.choice((b"XXXX" * 4, rng.choice(_CODECS) * 4, bytes(16), b"\xff" * 16))[: len(old)]
    return data.replace(old, new), f"codec {old!r} called {new!r}"


def _make(rng: random.Random, valid: Path, folder: Path) -> Input:
    source = folder / "source"
    source.mkdir()
    encoding.write_control(source)
    files = sorted((valid / "clips").iterdir())
    file = rng.choice(files)
    data, how = file.read_bytes(), rng.random()
    if how < 0.4:
        damaged, what = beside_marker(rng, data, _BOXES + _CHUNKS)
    elif how < 0.5:
        damaged, what = _other_codec(rng, data)
    elif how < 0.55:
        other = rng.choice(files)
        damaged, what = other.read_bytes(), f"holds {other.name}"
    elif how < 0.6:
        damaged, what = data + rng.choice(files).read_bytes(), "two files joined"
    else:
        damaged, what = bytes_damage(rng, data, rng.choice(files).read_bytes())
    (source / file.name).write_bytes(damaged)
    (source / file.name).with_suffix(".txt").write_text("a damaged file", encoding="utf-8")
    options = rng.choice(((), ("--fps", 5.0), ("--fps", 1000.0), ("--start", 0.2), ("--stride", 3)))
    return Input(f"{file.name}: {what}; {' '.join(map(str, options))}", settings={"options": options})


def _run(case: Input, valid: Path, folder: Path) -> Outcome:
    done = encoding.encode(folder / "source", folder / "out", valid, *case.settings["options"])
    return encoding.outcome(done, case, folder, folder / "out", inputs=2)


VIDEOS = Boundary("videos", 16, _prepare, _make, _run, quiet=True)
