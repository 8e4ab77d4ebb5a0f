"""Damaged pictures, and those whose header promises more than a machine holds."""

import random
import struct
from pathlib import Path

from fuzzing import encoding
from fuzzing.boundary import Boundary, Input, Outcome
from fuzzing.media import png, write_pictures, zeros
from fuzzing.mutate import beside_marker, bytes_damage

_MARKERS = (
    b"IHDR",
    b"IDAT",
    b"PLTE",
    b"tRNS",
    b"\xff\xc0",
    b"\xff\xc2",
    b"\xff\xc4",
    b"\xff\xda",
    b"Exif",
    b"VP8 ",
    b"VP8L",
    b"VP8X",
    b"BM",
    b"GIF8",
)
_MARKERS += (b"II*\0", b"ispe", b"iloc", b"av1C", b"ftyp", b"meta")


def _prepare(valid: Path) -> None:
    write_pictures(valid / "pictures")
    encoding.write_tokenizer(valid / "tokenizer.model")
    bombs = valid / "bombs"
    bombs.mkdir()
    (bombs / "bits.png").write_bytes(png(30_000, 30_000, zeros(3751 * 30_000), depth=1, colour=0))
    (bombs / "rgb.png").write_bytes(png(12_000, 12_000, zeros(36_001 * 12_000)))
    (bombs / "text.png").write_bytes(
        png(32, 32, zeros(97 * 32), chunks=((b"zTXt", b"a\0\0" + zeros(1 << 28)),))
    )
    (bombs / "profile.png").write_bytes(
        png(32, 32, zeros(97 * 32), chunks=((b"iCCP", b"a\0\0" + zeros(1 << 28)),))
    )


def _header_lie(rng: random.Random) -> tuple[str, bytes, str]:
    """A file whose header promises a vast picture and which holds next to nothing."""
    side = rng.choice((0, 30_000, 65_500, 2**31 - 1))
    short = side & 0xFFFF
    made = {
        "lie.png": png(
            side, side, zeros(1000), depth=rng.choice((1, 8, 16)), colour=rng.choice((0, 2, 3, 6))
        ),
        "lie.gif": b"GIF89a"
        + struct.pack("<HHBBB", short, short, 0x80, 0, 0)
        + bytes(6)
        + b",\0\0\0\0"
        + struct.pack("<HHB", short, short, 0)
        + b"\x02\0;",
        "lie.bmp": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 5000, 0, 0, 54, 40, side, side, 1, 24, 0, 4946, 0, 0, 0, 0)
        + bytes(4946),
        "lie.webp": b"RIFF"
        + struct.pack("<I", 30)
        + b"WEBPVP8L"
        + struct.pack("<IBI", 13, 0x2F, 0x0FFFFFFF)
        + bytes(9),
    }
    name = rng.choice(list(made))
    return name, made[name], f"{name} promises {side} x {side}"


def _make(rng: random.Random, valid: Path, folder: Path) -> Input:
    source = folder / "source"
    source.mkdir()
    encoding.write_control(source)
    files = sorted((valid / "pictures").iterdir())
    how = rng.random()
    if how < 0.04:
        file = rng.choice(sorted((valid / "bombs").iterdir()))
        name, data, what = (
            f"bomb-{file.name}",
            file.read_bytes(),
            f"{file.name}, which unpacks to hundreds of megabytes",
        )
    elif how < 0.12:
        name, data, what = _header_lie(rng)
    elif how < 0.2:
        one, other = rng.sample(files, 2)
        name, data, what = (
            f"x{other.suffix}",
            one.read_bytes(),
            f"{one.name} under the name of {other.suffix}",
        )
    else:
        file = rng.choice(files)
        if rng.random() < 0.35:
            data, what = beside_marker(rng, file.read_bytes(), _MARKERS, 24)
        else:
            other = rng.choice(files).read_bytes()
            data, what = bytes_damage(rng, file.read_bytes(), other)
        name, what = file.name, f"{file.name}: {what}"
    (source / name).write_bytes(data)
    (source / name).with_suffix(".txt").write_text("a damaged file", encoding="utf-8")
    return Input(what)


def _run(case: Input, valid: Path, folder: Path) -> Outcome:
    done = encoding.encode(folder / "source", folder / "out", valid)
    return encoding.outcome(done, case, folder, folder / "out", inputs=2)


PICTURES = Boundary("pictures", 14, _prepare, _make, _run, quiet=True)
