"""Video and image decoding with DALI: files to float32 pixels of one bucket.

DALI decodes, resizes (mode not_smaller), crops the centre and normalises. Where this build of DALI lacks the codec, PyAV decodes the chosen frames
and the same DALI operators do the rest. Frames are chosen from the container's own timestamps (data/video.py), because DALI pads silently
when it is asked for frames that are not there. What no decoder can notice is damage inside a frame's payload: VP9 has no checksums.

device="gpu" lets NVDEC decode; it needs a CUDA machine and has been written from DALI's documentation, without one.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import torch
from torch import Tensor

from megatron_apt.data.kinds import IMAGE_SUFFIXES, suffix_of
from megatron_apt.data.notes import Notes
from megatron_apt.data.rejected import RejectedInput
from megatron_apt.data.video import VideoInfo, choose_frames, decode_with_pyav, file_size, probe

DALI_CODECS = {
    "cpu": frozenset({"vp8", "vp9", "mjpeg"}),
    "gpu": frozenset({"vp8", "vp9", "mjpeg", "h264", "hevc", "av1", "mpeg4"}),
}
BATCH_BYTES = 256 << 20  # decoded frames held at once


@dataclass(frozen=True)
class Clip:
    """What to take from one file.

    Attributes:
        height, width: the bucket, in pixels. The picture is scaled until it covers the bucket, then its centre is cropped.
        frames: number of frames; an image file can only give 1.
        stride: every stride-th frame, if fps is 0.
        fps: frames per second of the result; 0 for the source's own.
        start: seconds from the first frame.
        allow_upscale: accept pictures smaller than the bucket.
    """

    path: Path
    height: int
    width: int
    frames: int = 1
    stride: int = 1
    fps: float = 0.0
    start: float = 0.0
    allow_upscale: bool = False

    @property
    def is_image(self) -> bool:
        return suffix_of(self.path) in IMAGE_SUFFIXES


def decode_clip(clip: Clip, device: str = "cpu") -> Tensor:
    """(3, F, H, W) float32 in [-1, 1]. A picture that needs no resizing comes through unchanged: round(127.5 x + 127.5) is its 8-bit value.

    Raises:
        RejectedInput: the file cannot give this clip.
    """
    (result,) = decode_clips([clip], device)
    if isinstance(result, RejectedInput):
        raise result
    return result


def decode_clips(clips: Sequence[Clip], device: str = "cpu", notes: Notes | None = None) -> list[Tensor | RejectedInput]:
    """Like decode_clip for many files, several at a time; a bad file gives its RejectedInput and does not disturb the others.

    Args:
        notes: gathers what was done to files that decode all the same.
    """
    if device == "gpu" and not torch.cuda.is_available():
        raise ValueError("decode device='gpu': no CUDA device is visible; use device='cpu'")
    if device not in DALI_CODECS:
        raise ValueError(f"decode device={device!r} is unknown; use 'cpu' or 'gpu'")
    results: list[Tensor | RejectedInput] = [None] * len(clips)
    plans = [_plan(clip, device) for clip in clips]
    for group in _groups(plans):
        chosen = [clips[i] for i in group]
        pictures = _decode_group(chosen, [plans[i] for i in group], device)
        for i, picture in zip(group, _fit(chosen, pictures), strict=True):
            results[i] = picture
    return results


@dataclass(frozen=True, eq=False)
class _Plan:
    """How a file will be decoded: route "image", "video" (DALI) or "pyav"; nbytes is the size of the decoded frames."""

    route: str
    nbytes: int
    indices: list[int]
    info: VideoInfo | None = None


def _plan(clip: Clip, device: str) -> _Plan | RejectedInput:
    path = Path(clip.path)
    try:
        if not clip.is_image:
            info = probe(path)
            indices = choose_frames(info, clip.frames, clip.stride, clip.fps, clip.start)
            route = "video" if info.codec in DALI_CODECS[device] and not info.hidden else "pyav"
            return _Plan(route, len(indices) * info.frame_bytes, indices, info)
        if clip.frames != 1:
            raise RejectedInput(path, "frames", clip.frames, "an image gives one frame; encode images with frames=1 in a dataset of their own")
        size = file_size(path)
    except RejectedInput as rejected:
        return rejected
    return _Plan("image", 16 * size, [])  # most photographs are compressed less than 16:1


def _groups(plans: Sequence[_Plan | RejectedInput]) -> Iterator[list[int]]:
    """Consecutive clips that are decoded and held together."""
    group, held = [], 0
    for i, plan in enumerate(plans):
        nbytes = 0 if isinstance(plan, RejectedInput) else plan.nbytes
        if group and (held + nbytes > BATCH_BYTES or len(group) == 256):
            yield group
            group, held = [], 0
        group.append(i)
        held += nbytes
    if group:
        yield group


def _decode_group(clips: list[Clip], plans: list[_Plan | RejectedInput], device: str) -> list[ndd.Tensor | RejectedInput]:
    """Pictures in their own size: uint8 "HWC" of images, "FHWC" of videos."""
    pictures: list[ndd.Tensor | RejectedInput] = list(plans)
    routes = {route: [i for i, plan in enumerate(plans) if isinstance(plan, _Plan) and plan.route == route] for route in ("pyav", "image", "video")}
    with ThreadPoolExecutor(min(len(routes["pyav"]), os.cpu_count() or 1) or 1) as pool:  # PyAV releases the interpreter lock
        for i, picture in zip(routes["pyav"], pool.map(lambda i: _pyav_picture(plans[i], device), routes["pyav"]), strict=True):
            pictures[i] = picture
    for route, decode in (("image", _dali_images), ("video", _dali_videos)):
        members = routes[route]
        jobs = [(np.fromfile(clips[i].path, np.uint8), plans[i].indices) for i in members]
        for i, picture in zip(members, _decode_jobs(jobs, decode, device), strict=True):
            pictures[i] = (
                picture
                if picture is not None
                else RejectedInput(
                    clips[i].path,
                    "payload",
                    "does not decode",
                    "the data are damaged or of an unsupported kind; fetch the file again or re-encode it",
                )
            )
    return pictures


def _pyav_picture(plan: _Plan, device: str) -> ndd.Tensor | RejectedInput:
    try:
        picture = ndd.as_tensor(decode_with_pyav(plan.info, plan.indices), layout="FHWC")
    except RejectedInput as rejected:
        return rejected
    return picture.gpu() if device == "gpu" else picture


def _dali_images(jobs: list[tuple], device: str) -> ndd.Batch:
    return ndd.decoders.image(ndd.batch([ndd.as_tensor(data) for data, _ in jobs]), device=device)


def _dali_videos(jobs: list[tuple], device: str) -> ndd.Batch:
    frames = ndd.batch([ndd.tensor(np.array(indices, np.int32)) for _, indices in jobs])
    return ndd.decoders.video(ndd.batch([ndd.as_tensor(data) for data, _ in jobs]), frames=frames, device=device)


def _decode_jobs(jobs: list[tuple], decode, device: str) -> list[ndd.Tensor | None]:
    """Decodes all jobs in one call. DALI fails the whole call for one bad file, so then each is tried alone; None marks the bad ones."""
    if not jobs:
        return []
    try:
        return list(decode(jobs, device).evaluate().tensors)
    except RuntimeError:
        if len(jobs) == 1:
            return [None]
        return [_decode_jobs([job], decode, device)[0] for job in jobs]


def _fit(clips: list[Clip], pictures: list[ndd.Tensor | RejectedInput]) -> list[Tensor | RejectedInput]:
    """Scales, crops and normalises the pictures; all of one bucket, layout and need for resizing go through DALI together."""
    results: list = list(pictures)
    calls: dict[tuple, list[int]] = {}
    for i, (clip, picture) in enumerate(zip(clips, pictures, strict=True)):
        if isinstance(picture, RejectedInput):
            continue
        height, width = picture.shape[-3:-1]
        scale = max(clip.height / height, clip.width / width)
        if scale > 1 and not clip.allow_upscale:
            remedy = f"smaller than the bucket {clip.width}x{clip.height}; use a smaller bucket or allow_upscale=True"
            results[i] = RejectedInput(clip.path, "size", f"{width}x{height}", remedy)
            continue
        calls.setdefault((clip.height, clip.width, picture.layout, scale != 1), []).append(i)
    for (height, width, layout, resize), members in calls.items():
        batch = ndd.batch([pictures[i] for i in members])
        if resize:  # with the crop in one operator, which computes a third of what scaling the whole picture would
            batch = ndd.resize_crop_mirror(batch, size=[height, width], mode="not_smaller", crop=(height, width))
        channels_first = "C" + layout.replace("C", "")
        normalized = ndd.crop_mirror_normalize(batch, crop=(height, width), mean=[127.5] * 3, std=[127.5] * 3, output_layout=channels_first)
        for i, pixels in zip(members, normalized.evaluate().cpu().tensors, strict=True):
            pixels = torch.from_dlpack(pixels).clone()  # DALI reuses its buffer
            results[i] = pixels if "F" in layout else pixels[:, None]
    return results
