"""Pictures and clips as files: PNG, animated GIF and mp4. Equal tensors give equal bytes.

Shapes: N samples, C = 3 colours, F frames, H x W pixels; values in [-1, 1] (others are
clipped, not-finite ones painted magenta).
"""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from torch import Tensor

from megatron_apt.files import write_product

GAP = 2  # white pixels between the cells of a grid
_MAGENTA = (255, 0, 255)


def save_png_grid(x: Tensor, path: str | Path, columns: int, scale: int = 1) -> None:
    """Write (N, 3, H, W) as one PNG, row by row, each pixel enlarged to scale x scale."""
    write_product(path, png_bytes(x, columns, scale))


def save_gif(x: Tensor, path: str | Path, fps: float, columns: int, scale: int = 1) -> None:
    """Write (N, 3, F, H, W) as one animated grid that repeats for ever; see `gif_bytes`."""
    write_product(path, gif_bytes(x, fps, columns, scale))


def save_mp4(x: Tensor, path: str | Path, fps: float, scale: int = 1) -> None:
    """Write (3, F, H, W) as H.264, yuv420p, BT.709. An odd height or width is PADDED by
    repeating the last row or column.
    """
    write_product(path, mp4_bytes(x, fps, scale))


def png_bytes(x: Tensor, columns: int, scale: int = 1) -> bytes:
    """(N, 3, H, W) as the bytes of a PNG grid."""
    _check(x, 4, "(N, 3, H, W)")
    data = io.BytesIO()
    Image.fromarray(_grid(_pixels(x[:, :, None]), columns, scale)[0]).save(data, "png")
    return data.getvalue()


def gif_bytes(x: Tensor, fps: float, columns: int, scale: int = 1) -> bytes:
    """(N, 3, F, H, W) as the bytes of an animated GIF grid.

    One palette of 256 colours for all frames (exact if they have no more). The format
    counts in 10 ms, at least 20 ms a frame here, because viewers slow down anything
    faster. Equal successive frames are stored as one that lasts longer.
    """
    return gif_of(grid_frames(x, columns, scale), fps)


def grid_frames(x: Tensor, columns: int, scale: int = 1) -> np.ndarray:
    """(N, 3, F, H, W) as bytes (F, height, width, 3): for each frame one grid, row by row."""
    _check(x, 5, "(N, 3, F, H, W)")
    return _grid(_pixels(x), columns, scale)


def gif_of(pixels: np.ndarray, fps: float) -> bytes:
    """Bytes (F, height, width, 3) as an animated GIF; see `gif_bytes`."""
    frames = _with_palette(pixels)
    data = io.BytesIO()
    duration = max(2, round(100 / _positive(fps))) * 10
    frames[0].save(
        data, "gif", save_all=True, append_images=frames[1:], duration=duration, loop=0, optimize=False
    )
    return data.getvalue()


def mp4_bytes(x: Tensor, fps: float, scale: int = 1) -> bytes:
    """(3, F, H, W) as the bytes of an mp4 file; see `save_mp4`."""
    _check(x, 4, "(3, F, H, W)", colours=0)
    frames = _grid(_pixels(x[None]), 1, scale)
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        # One thread: with more, x264's rate control and so the bytes depend on the machine.
        stream = container.add_stream(
            "libx264", Fraction(_positive(fps)).limit_denominator(1001), options={"crf": "12", "threads": "1"}
        )
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = Colorspace.ITU709, ColorRange.MPEG
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
            frame = frame.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return data.getvalue()


def _pixels(x: Tensor) -> np.ndarray:
    """(N, 3, F, H, W) floats -> (N, F, H, W, 3) bytes."""
    x = x.detach().float().cpu()
    levels = ((x.clamp(-1, 1) + 1) * 127.5).round()
    magenta = torch.tensor(_MAGENTA, dtype=levels.dtype).view(3, 1, 1, 1)
    # Visible, not an error: pictures of a run that diverged are wanted most.
    levels = torch.where(x.isfinite().all(1, keepdim=True), levels, magenta)
    return levels.to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()


def _grid(cells: np.ndarray, columns: int, scale: int) -> np.ndarray:
    """(N, F, H, W, 3) -> (F, height, width, 3), cells in reading order."""
    if columns < 1 or scale < 1:
        raise ValueError(f"columns = {columns} and scale = {scale} must be at least 1")
    cells = cells.repeat(scale, axis=2).repeat(scale, axis=3)
    n, frames, height, width, _ = cells.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    grid = np.full((frames, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for index, cell in enumerate(cells):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        grid[:, top : top + height, left : left + width] = cell
    return grid


def _with_palette(frames: np.ndarray) -> list[Image.Image]:
    """(F, H, W, 3) bytes -> palette images that share one palette."""
    count, height, width, _ = frames.shape
    packed = frames.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    colours, index = np.unique(packed, return_inverse=True)
    if len(colours) <= 256:
        palette = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], 1).astype(np.uint8)
        index = index.reshape(frames.shape[:3]).astype(np.uint8)
    else:
        # All frames as one tall picture: still areas then keep their colour over time,
        # where a palette per frame flickers.
        tall = Image.fromarray(frames.reshape(count * height, width, 3)).quantize(
            256, dither=Image.Dither.NONE
        )
        palette, index = np.array(tall.getpalette(), np.uint8), np.asarray(tall).reshape(frames.shape[:3])
    images = [Image.fromarray(frame, "P") for frame in index]
    for image in images:
        image.putpalette(palette.tobytes())
    return images


def _check(x: Tensor, ndim: int, shape: str, colours: int = 1) -> None:
    if x.ndim != ndim or x.shape[colours] != 3 or not x.numel():
        raise ValueError(
            f"got {tuple(x.shape)}, need {shape} and not empty; repeat a grey channel three times"
        )


def _positive(fps: float) -> float:
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps = {fps} must be positive and finite")
    return fps
