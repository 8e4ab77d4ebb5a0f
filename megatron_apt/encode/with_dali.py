"""DALI's part of decoding: the kinds of file it reads itself, and scaling, cropping and
normalising of all pictures. without_dali.py offers the same where DALI is not installed.
"""

from collections.abc import Sequence

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import torch
from torch import Tensor

DECODES_PICTURES = True
CODECS = {
    "cpu": frozenset({"vp8", "vp9", "mjpeg"}),
    "gpu": frozenset({"vp8", "vp9", "mjpeg", "h264", "hevc", "av1", "mpeg4"}),
}
"""Of videos that it decodes, by device."""

Pixels = ndd.Tensor
"""uint8, "HWC" or "FHWC"."""


def as_pixels(array: np.ndarray, device: str) -> Pixels:
    """What PyAV or Pillow decoded, for `fitted`."""
    pixels = ndd.as_tensor(array, layout="FHWC"[-array.ndim :])
    return pixels.gpu() if device == "gpu" else pixels


def pictures(files: list[np.ndarray], device: str) -> list[Pixels | None]:
    """Pixels of each file's bytes; None for one that does not decode."""
    return _each(files, _pictures, device)


def videos(jobs: list[tuple[np.ndarray, list[int]]], device: str) -> list[Pixels | None]:
    """Of each file's bytes the frames of these numbers; None for one that does not decode."""
    return _each(jobs, _videos, device)


def some_frames(pixels: Pixels, positions: np.ndarray) -> Pixels:
    return ndd.as_tensor(np.asarray(pixels)[positions], layout="FHWC")


def fitted(
    pictures: Sequence[Pixels],
    height: int,
    width: int,
    scaled: bool,
    shown: tuple[float, float] | None = None,
) -> list[Tensor]:
    """Scales pictures until they cover (height, width), crops the centre and maps 0 .. 255
    to [-1, 1].

    Args:
        pictures: of any sizes; all pictures, or all clips.
        scaled: False for pictures that only are to be cropped.
        shown: for pictures of one size whose pixels are not square: (height, width) of
            the whole picture in square ones.

    Returns:
        float32 (3, height, width), or (3, F, height, width) of clips.
    """
    batch = ndd.batch(list(pictures))
    if shown:
        batch = _stretch(batch, height, width, pictures[0].shape[-3:-1], shown)
    elif scaled:
        # With the crop in one operator, which computes a third of what scaling the whole
        # picture would
        batch = ndd.resize_crop_mirror(batch, size=[height, width], mode="not_smaller", crop=(height, width))
    normalized = ndd.crop_mirror_normalize(
        batch,
        crop=(height, width),
        mean=[127.5] * 3,
        std=[127.5] * 3,
        output_layout="CFHW" if len(pictures[0].shape) == 4 else "CHW",
    )
    # Copies, because DALI reuses its buffer
    return [torch.from_dlpack(pixels).clone() for pixels in normalized.evaluate().cpu().tensors]


def _each(jobs: list, decode, device: str) -> list[Pixels | None]:
    """Decodes all jobs in one call. DALI fails the whole call for one bad file, so then
    each is tried alone.
    """
    if not jobs:
        return []
    try:
        return list(decode(jobs, device).evaluate().tensors)
    except RuntimeError:
        if len(jobs) == 1:
            return [None]
        return [_each([job], decode, device)[0] for job in jobs]


def _pictures(files: list[np.ndarray], device: str) -> ndd.Batch:
    return ndd.decoders.image(ndd.batch([ndd.as_tensor(data) for data in files]), device=device)


def _videos(jobs: list[tuple[np.ndarray, list[int]]], device: str) -> ndd.Batch:
    frames = ndd.batch([ndd.tensor(np.array(indices, np.int32)) for _, indices in jobs])
    return ndd.decoders.video(
        ndd.batch([ndd.as_tensor(data) for data, _ in jobs]), frames=frames, device=device
    )


def _stretch(
    batch: ndd.Batch, height: int, width: int, pixels: tuple[int, int], shown: tuple[float, float]
) -> ndd.Batch:
    """Pictures whose pixels are not square: the centre that the bucket shows, scaled by
    each axis' own factor.
    """
    scale = max(height / shown[0], width / shown[1])
    spans = [
        bucket / scale * own / square
        for bucket, own, square in zip((height, width), pixels, shown, strict=True)
    ]
    begin = [(own - span) / 2 for own, span in zip(pixels, spans, strict=True)]
    end = [own - start for own, start in zip(pixels, begin, strict=True)]
    return ndd.resize(batch, size=[height, width], mode="stretch", roi_start=begin, roi_end=end)
