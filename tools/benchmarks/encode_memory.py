"""Peak memory of `megatron-apt encode` on the worst files: each case is encoded by a
process of its own, whose largest resident set is printed.

    python tools/benchmarks/encode_memory.py --json encode_memory.json
    python tools/benchmarks/encode_memory.py --only picture_rgba video_8k

Exits with 1 if a case goes over the bound. Files are generated with PyAV and zlib;
--scale makes sides and lengths smaller for a quick look.
"""

import json
import math
import struct
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import tyro
from PIL import Image

from megatron_apt import outputs, scripts
from megatron_apt.encode.command import encode
from megatron_apt.encode.config import EncodeConfig

MOST_PIXELS = EncodeConfig.most_pixels


@dataclass(frozen=True)
class Args:
    scale: float = 1.0
    """Sides of pictures and lengths of videos, as a share of the worst case's."""
    bound: float = 2.0
    """GiB that a case may take."""
    only: tuple[str, ...] = ()
    """Names of the cases to run; all of them if left out."""
    json: str = ""
    """File for the results."""
    measure: str = ""
    """Used by the benchmark itself: the manifest to encode in this process."""
    frames: int = 1
    """With measure: frames of the bucket."""


def manifest(folder: Path, rows: list[dict]) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps({"caption": "a picture", **row}) + "\n" for row in rows))
    return path


def write_video(
    path: Path, codec: str, pix_fmt: str, height: int, width: int, count: int, options: dict, **context
) -> Path:
    """Noise in blocks that move: little for the codec to predict, quick to make."""
    texture = (
        np.random.default_rng(0)
        .integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        .repeat(8, 0)
        .repeat(8, 1)[:height, :width]
    )
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        for field, value in context.items():
            setattr(stream.codec_context, field, value)
        for k in range(count):
            frame = av.VideoFrame.from_ndarray(np.roll(texture, 8 * k, axis=1), format="rgb24").reformat(
                format=pix_fmt
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_png(path: Path, height: int, width: int, channels: int, depth: int = 8) -> Path:
    """A picture of one colour, written row by row: gigabytes of pixels in a few kilobytes of file."""
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    packer, row = zlib.compressobj(1), b"\0" + b"\x80" * (width * channels * depth // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
            (b"IDAT", packed),
            (b"IEND", b""),
        ):
            file.write(
                struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            )
    return path


def clips_of_one(folder: Path, name: str, codec: str, pix_fmt: str, count: int, options: dict) -> Path:
    path = write_video(folder / name, codec, pix_fmt, 240, 320, count, options)
    return manifest(folder, [{"path": path.name, "start": k * (count - 25) / 25 / 40} for k in range(40)])


def video(
    folder: Path,
    name: str,
    codec: str,
    pix_fmt: str,
    height: int,
    width: int,
    count: int,
    clips: int,
    **context,
) -> Path:
    options = {"preset": "ultrafast", **({"x265-params": "log-level=none"} if codec == "libx265" else {})}
    write_video(folder / name, codec, pix_fmt, height // 2 * 2, width // 2 * 2, count, options, **context)
    return manifest(folder, [{"path": name}] * clips)


def png(folder: Path, side: int, channels: int, depth: int = 8, copies: int = 2) -> Path:
    write_png(folder / "a.png", side, side, channels, depth)
    return manifest(folder, [{"path": "a.png"}] * copies)


def jpeg(folder: Path, side: int, copies: int, **options) -> Path:
    Image.effect_noise((side, side), 60).convert("RGB").save(folder / "a.jpg", quality=90, **options)
    return manifest(folder, [{"path": "a.jpg"}] * copies)


def too_large(folder: Path, side: int) -> Path:
    write_png(folder / "bomb.png", side, side, 3)
    write_png(folder / "small.png", 256, 256, 3)
    return manifest(folder, [{"path": "bomb.png"}, {"path": "small.png"}])


def long_caption(folder: Path, count: int) -> Path:
    write_png(folder / "a.png", 128, 128, 3)
    return manifest(folder, [{"path": "a.png", "caption": "word " * count}, {"path": "a.png"}])


def cases(scale: float) -> dict[str, tuple]:
    """Name: (what writes its files and gives the manifest, frames of the bucket)."""
    side, most = lambda pixels: max(128, int(pixels * scale)), math.isqrt(MOST_PIXELS)
    count = max(50, int(1500 * scale))
    return {
        "mjpeg_40_clips": (
            lambda f: clips_of_one(f, "a.avi", "mjpeg", "yuvj420p", count, {"qscale": "2"}),
            1,
        ),
        "vp9_40_clips": (
            lambda f: clips_of_one(f, "a.webm", "libvpx-vp9", "yuv420p", count, {"cpu-used": "8", "b": "9M"}),
            1,
        ),
        "video_4k": (lambda f: video(f, "a.mp4", "libx264", "yuv420p", side(2160), side(3840), 17, 4), 17),
        "video_4k_hdr": (
            lambda f: video(
                f, "a.mp4", "libx265", "yuv420p10le", side(2160), side(3840), 9, 2, color_trc=16, colorspace=9
            ),
            9,
        ),
        "video_8k": (lambda f: video(f, "a.mp4", "libx264", "yuv420p", side(4320), side(7680), 9, 2), 9),
        "picture_rgb": (lambda f: png(f, side(most), 3), 1),
        "picture_rgba": (lambda f: png(f, side(most), 4), 1),
        "picture_16_bits": (lambda f: png(f, side(most), 1, 16), 1),
        "picture_jpeg": (lambda f: jpeg(f, side(most), 2), 1),
        "picture_turned": (lambda f: jpeg(f, side(most), 2, exif=_turned()), 1),
        "pictures_12_megapixels": (lambda f: jpeg(f, side(3464), 24), 1),
        "picture_too_large": (lambda f: too_large(f, side(30000) if scale == 1 else most + 1), 1),
        "long_caption": (lambda f: long_caption(f, int(10_000_000 * scale)), 1),
    }


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def measure(source: Path, frames: int) -> int:
    """Peak of this process, in bytes, after encoding; what is rejected does not matter here."""
    with tempfile.TemporaryDirectory() as folder:
        config = EncodeConfig(
            str(source), folder + "/out", 128, 128, frames, pixel_temporal=1, text_width=8, max_rejected=1.0
        )
        encode(config, progress=False)
    # Not getrusage's maximum, which counts what the parent held as it forked.
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024


def main(args: Args) -> int:
    if args.measure:
        print(measure(Path(args.measure), args.frames))
        return 0
    outputs.check("json", args.json)
    known = cases(args.scale)
    if unknown := set(args.only) - set(known):
        raise SystemExit(f"--only {' '.join(sorted(unknown))}: unknown; the cases are {', '.join(known)}")
    results = {}
    for name in args.only or known:
        write, frames = known[name]
        with tempfile.TemporaryDirectory() as folder:
            source = write(Path(folder))
            command = [
                sys.executable,
                "-W",
                "ignore",
                __file__,
                "--measure",
                str(source),
                "--frames",
                str(frames),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: encoding failed\n{done.stderr[-2000:]}")
        results[name] = int(done.stdout.split()[-1])
        verdict = "" if results[name] <= args.bound * 2**30 else f"   above {args.bound:g} GiB"
        print(f"{name:24} {results[name] / 2**20:8.0f} MiB{verdict}", flush=True)
    if args.json:
        Path(args.json).write_text(
            json.dumps({"bound_gib": args.bound, "scale": args.scale, "peak_bytes": results}, indent=1) + "\n"
        )
    return int(any(peak > args.bound * 2**30 for peak in results.values()))


if __name__ == "__main__":
    scripts.run(lambda: main(tyro.cli(Args, description=__doc__)))
