"""with_dali.py's work on systems for which there is no DALI: PyAV and Pillow decode every
file, and Pillow scales, by the same rules. Scaled pixels differ from DALI's by rounding.
"""

import math
import platform
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

DECODES_PICTURES = False
CODECS = {"cpu": frozenset()}

Pixels = np.ndarray

if platform.system() == "Linux":
    warnings.warn(
        "DALI is not installed: PyAV and Pillow do its work, more slowly (pip install nvidia-dali-cuda130)",
        stacklevel=2,
    )


def as_pixels(array: np.ndarray, device: str) -> Pixels:
    return array


def fitted(
    pictures: Sequence[Pixels],
    height: int,
    width: int,
    scaled: bool,
    shown: tuple[float, float] | None = None,
) -> list[Tensor]:
    """As with_dali.fitted."""
    return [_fitted(picture, height, width, scaled, shown) for picture in pictures]


def _fitted(picture: Pixels, height: int, width: int, scaled: bool, shown: tuple | None) -> Tensor:
    *_, rows, columns, _ = picture.shape
    if shown or scaled:
        frames = picture if picture.ndim == 4 else picture[None]
        taken = np.stack([_scaled(frame, height, width, shown) for frame in frames])
        taken = taken if picture.ndim == 4 else taken[0]
    else:
        top, left = _half(rows - height), _half(columns - width)
        taken = picture[..., top : top + height, left : left + width, :]
    pixels = torch.from_numpy(np.ascontiguousarray(taken)).movedim(-1, 0)
    return pixels.float().sub_(127.5).div_(127.5).contiguous()


def _scaled(frame: np.ndarray, height: int, width: int, shown: tuple[float, float] | None) -> np.ndarray:
    """The part that the bucket shows, with an antialiased linear filter. The picture
    continues with its edge pixels, which Pillow alone would leave out.
    """
    own, sizes = frame.shape[:2], (height, width)
    scale = max(size / all_of_it for size, all_of_it in zip(sizes, shown or own, strict=True))
    if shown:
        spans = [_centre(*axis, scale) for axis in zip(own, shown, sizes, strict=True)]
    else:
        spans = [_whole_pixels(*axis, scale) for axis in zip(own, sizes, strict=True)]
    steps = [(end - begin) / size for (begin, end), size in zip(spans, sizes, strict=True)]
    margins = [math.ceil(max(1.0, step)) + 1 for step in steps]
    padded = np.pad(frame, [*((margin, margin) for margin in margins), (0, 0)], mode="edge")
    (top, bottom), (left, right) = (
        (begin + margin, end + margin) for (begin, end), margin in zip(spans, margins, strict=True)
    )
    scaled = Image.fromarray(padded).resize(
        (width, height), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
    )
    return np.asarray(scaled)


def _centre(own: int, shown: float, size: int, scale: float) -> tuple[float, float]:
    """Begin and end, on an axis of `own` pixels shown as `shown` square ones, of the
    centre that fills the bucket's `size`.
    """
    span = size / scale * own / shown
    return (own - span) / 2, (own + span) / 2


def _whole_pixels(own: int, size: int, scale: float) -> tuple[float, float]:
    """The same for square pixels. The scaled picture has a whole number of pixels, and so
    has what is cropped off before the bucket; DALI rounds products of float32.
    """
    scaled = math.floor(np.float32(own) * np.float32(scale) + 0.5)
    begin = own / 2 + (_half(scaled - size) - scaled / 2) / scale
    return begin, begin + size / scale


def _half(pixels: int) -> int:
    """Of what is cropped on an axis, as DALI rounds."""
    return (pixels + 1) // 2
