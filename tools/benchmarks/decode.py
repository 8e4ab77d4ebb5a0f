"""Frames per second of this package's decoding (DALI, with PyAV for what DALI's CPU build
lacks) beside PyAV alone.

Both take the same frames of the same files and give (3, F, H, W) float32 of the same
bucket: PyAV with its own scaler, then a centre crop in NumPy.

    python tools/benchmarks/decode.py --json decode.json
    python tools/benchmarks/decode.py --file clip.mp4 --height 256 --width 256 --frames 33
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import tyro

from megatron_apt import outputs, scripts
from megatron_apt.encode.decode import Clip, decode_clip, decode_clips


@dataclass(frozen=True)
class Args:
    file: tuple[Path, ...] = ()
    """Videos to decode beside the VP9 and the H.264 file that the benchmark writes."""
    height: int = 256
    width: int = 256
    frames: int = 33
    clips: int = 8
    """Clips decoded in one call."""
    repeats: int = 3
    """The fastest of so many runs counts."""
    json: str = ""
    """File for the results."""


def write_moving_noise(path: Path, codec: str, count: int, height: int = 360, width: int = 630) -> Path:
    """Random 8x8 squares that move: something for the codec to predict, but not for free."""
    texture = (
        np.random.default_rng(0).random((height // 8, width // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)[:, :width]
        * 255
    )
    with av.open(str(path), "w") as container:
        options = (
            {"cpu-used": "8", "deadline": "realtime", "b": "2M"} if "vp" in codec else {"preset": "veryfast"}
        )
        stream: Any = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for k in range(count):
            frame = av.VideoFrame.from_ndarray(
                np.roll(texture, 3 * k, axis=1).astype(np.uint8), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decode_pyav_alone(path: Path, height: int, width: int, frames: int) -> torch.Tensor:
    """(3, frames, height, width) float32 in [-1, 1] from the first frames."""
    pictures = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        scale = max(height / stream.height, width / stream.width)
        rows, columns = max(height, round(stream.height * scale)), max(width, round(stream.width * scale))
        top, left = (rows - height + 1) // 2, (columns - width + 1) // 2  # as DALI rounds
        for frame in container.decode(stream):
            picture = frame.reformat(
                width=columns, height=rows, format="rgb24", interpolation="BILINEAR"
            ).to_ndarray()
            pictures.append(picture[top : top + height, left : left + width])
            if len(pictures) == frames:
                break
    return torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2).float().div_(127.5).sub_(1).contiguous()


def fastest(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def repeated(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()


def main(args: Args) -> None:
    outputs.check("json", args.json)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        vp9 = write_moving_noise(Path(folder) / "vp9.webm", "libvpx-vp9", args.frames + 8)
        h264 = write_moving_noise(Path(folder) / "h264.mp4", "libx264", args.frames + 8)
        for path in (vp9, h264, *args.file):
            clip = Clip(path, args.height, args.width, args.frames, allow_upscale=True)
            alone = partial(decode_pyav_alone, path, args.height, args.width, args.frames)
            difference = (decode_clip(clip) - alone()).abs().mean().item()
            total = args.clips * args.frames
            ours = total / fastest(partial(decode_clips, [clip] * args.clips), args.repeats)
            pyav = total / fastest(partial(repeated, alone, args.clips), args.repeats)
            results.append(
                {
                    "file": path.name,
                    "ours_fps": ours,
                    "pyav_fps": pyav,
                    "ratio": ours / pyav,
                    "mean_difference": difference,
                }
            )
            speeds = f"ours {ours:8.1f} frames/s   PyAV alone {pyav:8.1f} frames/s   ratio {ours / pyav:5.2f}"
            print(f"{path.name:24} {speeds}   mean difference {difference:.4f}")
    if args.json:
        Path(args.json).write_text(
            json.dumps({"bucket": [args.frames, args.height, args.width], "results": results}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    scripts.run(lambda: main(tyro.cli(Args, description=__doc__)))
