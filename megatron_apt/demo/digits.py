"""Demo data: scikit-learn's 1,797 handwritten digits as real picture and video files with captions."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange
from PIL import Image

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = ("left", "right")
COUNT = 1797
FPS = 8


def load_digit_pictures() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) uint8 grey pictures, white on black, and their (1797,) labels 0 .. 9.
    The source's 17 levels 0 .. 16 become 0 .. 255.
    """
    from sklearn.datasets import load_digits  # a second to import, for the demo only

    data = load_digits()
    return np.round(data.images * (255 / 16)).astype(np.uint8), data.target


def write_digit_images(folder: str | Path, count: int = COUNT) -> Path:
    """Writes 8x8 grey PNG files and manifest.jsonl (path, caption like "a handwritten
    seven", label); returns the manifest's path.

    Args:
        count: how many of the 1,797 digits, from the first.
    """
    pictures, labels = load_digit_pictures()

    def write(path: Path, i: int) -> dict:
        Image.fromarray(pictures[i]).save(path)
        return {"caption": f"a handwritten {WORDS[labels[i]]}", "label": int(labels[i])}

    return _write_all(Path(folder), ".png", count, write)


def slide(
    picture: np.ndarray, direction: str, first: int, frames: int, height: int, width: int, step: int
) -> np.ndarray:
    """(frames, height, width) uint8: the picture on a black canvas, vertically centred,
    from column `first` on moving `step` pixels a frame.

    What leaves the canvas on one side comes back on the other.
    """
    clip = np.zeros((frames, height, width), np.uint8)
    top = (height - picture.shape[0]) // 2
    clip[:, top : top + picture.shape[0], : picture.shape[1]] = picture
    sign = {"left": -1, "right": 1}[direction]
    return np.stack([np.roll(frame, first + sign * step * k, axis=1) for k, frame in enumerate(clip)])


def digit_clip(
    picture: np.ndarray, index: int, frames: int, height: int, width: int, step: int, seed: int
) -> tuple[np.ndarray, str]:
    """Clip and direction of digit `index`; the direction depends on (seed, index) only.

    The digit sets out from the edge it moves away from. It stays inside the canvas where
    its way is short enough; a longer way wraps around.
    """
    random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, index]))
    direction = DIRECTIONS[random.integers(2)]
    first = width - picture.shape[1] if direction == "left" else 0
    return slide(picture, direction, first, frames, height, width, step), direction


def write_digit_clips(
    folder: str | Path,
    frames: int = 5,
    height: int = 8,
    width: int = 16,
    step: int = 2,
    seed: int = 0,
    count: int = COUNT,
) -> Path:
    """Writes each digit sliding left or right as a lossless VP9 file, and manifest.jsonl;
    returns the manifest's path.

    A line of the manifest has path, caption like "a handwritten seven moving left", label
    and direction.

    Raises:
        ValueError: canvas smaller than the 8x8 digits.
    """
    if height < 8 or width < 8:
        raise ValueError(f"height={height}, width={width}: the digits are 8x8; use at least 8 for both")
    pictures, labels = load_digit_pictures()

    def write(path: Path, i: int) -> dict:
        clip, direction = digit_clip(pictures[i], i, frames, height, width, step, seed)
        write_grey_vp9(path, clip)
        return {
            "caption": f"a handwritten {WORDS[labels[i]]} moving {direction}",
            "label": int(labels[i]),
            "direction": direction,
        }

    return _write_all(Path(folder), ".webm", count, write)


def write_grey_vp9(path: Path, clip: np.ndarray, fps: int = FPS) -> None:
    """(F, H, W) uint8 luma as lossless VP9. Full colour range: decoded to RGB, each
    channel is the luma, exactly.
    """
    options = {"lossless": "1", "deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = clip.shape[2], clip.shape[1], "yuv420p"
        stream.codec_context.color_range = ColorRange.JPEG
        stream.codec_context.thread_count = 1
        for k, luma in enumerate(clip):
            frame = av.VideoFrame(clip.shape[2], clip.shape[1], "yuv420p")
            frame.color_range, frame.pts = ColorRange.JPEG, k
            for plane, values in zip(frame.planes, (luma, 128, 128), strict=True):  # chroma 128 is grey
                rows = np.zeros((plane.height, plane.line_size), np.uint8)  # rows are padded to line_size
                rows[:, : plane.width] = values
                plane.update(rows.tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _write_all(folder: Path, suffix: str, count: int, write: Callable[[Path, int], dict]) -> Path:
    """Writes files 0000 .. in two threads (encoders release the interpreter lock), then
    the manifest, last.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def one(i: int) -> str:
        path = folder / f"{i:04d}{suffix}"
        return json.dumps({"path": path.name, **write(path, i)})

    with ThreadPoolExecutor(2) as pool:
        lines = list(pool.map(one, range(count)))
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest
