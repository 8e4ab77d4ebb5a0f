"""Video and image decoding: files to float32 pixels of one bucket.

DALI (with_dali.py) decodes, resizes (mode not_smaller), crops the centre and normalises. What this build
of DALI does not decode, or would not show as players and viewers do (other matrices than
BT.601, HDR, turned or interlaced pictures, pixels that are not square, transparency,
colour profiles), PyAV or Pillow decodes, and the same DALI operators do the rest. Frames
are chosen from the container's own timestamps (encode/video.py), because DALI pads
silently when it is asked for frames that are not there. What no decoder can notice is
damage inside a frame's payload: VP9 has no checksums. Where there is no DALI, as on
macOS, PyAV and Pillow do all of it (without_dali.py).

device="gpu" lets NVDEC decode, by the same rules; it needs a CUDA machine and has been
written from DALI's documentation, without one.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatron_apt.encode import pictures
from megatron_apt.encode.frames import is_plain, shots
from megatron_apt.encode.kinds import IMAGE_SUFFIXES, VIDEO_SUFFIXES, suffix_of
from megatron_apt.encode.notes import Notes
from megatron_apt.encode.policy import PixelPolicy
from megatron_apt.encode.rejected import RejectedInput
from megatron_apt.encode.video import VideoInfo, choose_frames, file_size, probe

if TYPE_CHECKING:  # the other one has a part of its functions, which are alike
    from megatron_apt.encode import with_dali as backend
else:
    try:
        from megatron_apt.encode import with_dali as backend
    except ModuleNotFoundError as missing:
        if not (missing.name or "").startswith("nvidia"):
            raise
        from megatron_apt.encode import without_dali as backend

DEVICES = ("cpu", "gpu")
# An AVI whose index is damaged makes DALI end the whole program (SIGSEGV)
DALI_CONTAINERS = frozenset({"matroska", "mov"})
BATCH_BYTES = 256 << 20  # decoded frames held at once
CHUNK_BYTES = 64 << 20  # of one clip, where all its frames would be more than BATCH_BYTES
DALI_VIDEO_BYTES = 32 << 20  # DALI reads and indexes a file whole; in longer ones PyAV seeks


@dataclass(frozen=True)
class Clip:
    """What to take from one file.

    Attributes:
        height, width: the bucket, in pixels. The picture is scaled until it covers the
            bucket, then its centre is cropped.
        frames: number of frames; an image file can only give 1.
        stride: every stride-th frame, if fps is 0.
        fps: frames per second of the result; 0 for the source's own.
        start: seconds from the first frame.
        allow_upscale: accept pictures smaller than the bucket.
        policy: what is done with HDR, interlaced, transparent and huge pictures.
    """

    path: Path
    height: int
    width: int
    frames: int = 1
    stride: int = 1
    fps: float = 0.0
    start: float = 0.0
    allow_upscale: bool = False
    policy: PixelPolicy = field(default_factory=PixelPolicy)

    @property
    def is_image(self) -> bool:
        return suffix_of(self.path) in IMAGE_SUFFIXES


def decode_clip(clip: Clip, device: str = "cpu", notes: Notes | None = None) -> Tensor:
    """(3, F, H, W) float32 in [-1, 1]. A picture that needs no resizing comes through
    unchanged: round(127.5 x + 127.5) is its 8-bit value.

    Raises:
        RejectedInput: the file cannot give this clip.
    """
    (result,) = decode_clips([clip], device, notes)
    if isinstance(result, RejectedInput):
        raise result
    return result


def decode_clips(
    clips: Sequence[Clip], device: str = "cpu", notes: Notes | None = None
) -> list[Tensor | RejectedInput]:
    """Like decode_clip for many files, several at a time; a bad file gives its
    RejectedInput and does not disturb the others.

    Args:
        notes: gathers what was done to files that decode all the same.
    """
    if device == "gpu" and not torch.cuda.is_available():
        raise ValueError("decode device='gpu': no CUDA device is visible; use device='cpu'")
    if device not in DEVICES:
        raise ValueError(f"decode device={device!r} is unknown; use 'cpu' or 'gpu'")
    if device not in backend.CODECS:
        raise ValueError(
            f"decode device={device!r} is DALI's, which is not installed; use device='cpu', or "
            "pip install nvidia-dali-cuda130"
        )
    notes = Notes() if notes is None else notes
    plans = [_plan(clip, device) for clip in clips]
    results: list[Tensor | RejectedInput] = []
    for group in _groups(plans):
        results += _decode_group(
            clips[group.start : group.stop], plans[group.start : group.stop], device, notes
        )
        gc.collect(1)  # DALI's tensors refer to themselves, so that nothing else would free them in time
    return results


@dataclass(frozen=True, eq=False)
class _Plan:
    """How a file will be decoded: route "image" or "video" (DALI), "pillow" or "pyav";
    nbytes is what is held while it is.
    """

    route: str
    nbytes: int
    indices: list[int] = field(default_factory=list)
    info: VideoInfo | None = None

    @property
    def video(self) -> VideoInfo:
        """Of the routes "video" and "pyav"."""
        assert self.info is not None
        return self.info


@dataclass(frozen=True, eq=False)
class _Picture:
    """Decoded pixels, uint8 "HWC" or "FHWC", and their (height, width) in square pixels."""

    pixels: backend.Pixels
    shown: tuple[float, float]


def _plan(clip: Clip, device: str) -> _Plan | RejectedInput:
    path = Path(clip.path)
    try:
        size = file_size(path)
        head = pictures.inspect(path, clip.policy) if suffix_of(path) not in VIDEO_SUFFIXES else None
        if head is None and suffix_of(path) in IMAGE_SUFFIXES:
            raise RejectedInput(path, "payload", "not a picture that is known here", pictures.DAMAGED)
        if head is None or head.hdr or (head.moving and clip.frames > 1):
            return _video_plan(clip, path, device)
        if clip.frames != 1:
            raise RejectedInput(
                path,
                "frames",
                clip.frames,
                "an image gives one frame; encode images with frames=1 in a dataset of their own",
            )
        by_dali = head.by_dali and backend.DECODES_PICTURES
        if by_dali:
            pictures.check_whole(path)
    except RejectedInput as rejected:
        return rejected
    decoded = head.height * head.width
    return _Plan("image", 6 * decoded + size) if by_dali else _Plan("pillow", 10 * decoded)


def _video_plan(clip: Clip, path: Path, device: str) -> _Plan:
    info = probe(path)
    indices = choose_frames(info, clip.frames, clip.stride, clip.fps, clip.start)
    nbytes = len(indices) * info.frame_bytes
    small = nbytes <= BATCH_BYTES and info.size <= DALI_VIDEO_BYTES
    known = info.container in DALI_CONTAINERS and info.codec in backend.CODECS[device]
    by_dali = (
        known
        and small
        and info.alone
        and info.seekable
        and info.one_size
        and not info.hidden
        and is_plain(info)
    )
    return (
        _Plan("video", nbytes + info.size, indices, info) if by_dali else _Plan("pyav", nbytes, indices, info)
    )


def _groups(plans: Sequence[_Plan | RejectedInput]) -> Iterator[range]:
    """Consecutive clips that are decoded and held together."""
    start, held = 0, 0
    for i, plan in enumerate(plans):
        nbytes = 0 if isinstance(plan, RejectedInput) else plan.nbytes
        if i > start and (held + nbytes > BATCH_BYTES or i - start == 256):
            yield range(start, i)
            start, held = i, 0
        held += nbytes
    if plans:
        yield range(start, len(plans))


def _decode_group(
    clips: Sequence[Clip], plans: Sequence[_Plan | RejectedInput], device: str, notes: Notes
) -> list[Tensor | RejectedInput]:
    if len(plans) == 1 and isinstance(plans[0], _Plan) and plans[0].route == "pyav":
        return [_decode_piecewise(clips[0], plans[0], device, notes)]
    found: list = list(plans)  # a plan is replaced by the _Picture or RejectedInput that comes of it
    routes = {
        route: [i for i, plan in enumerate(plans) if isinstance(plan, _Plan) and plan.route == route]
        for route in ("pyav", "pillow")
    }
    for route, decode in (("pyav", _pyav_picture), ("pillow", _pillow_picture)):
        places = routes[route]
        work = partial(_or_rejected, decode, device=device, notes=notes)
        # Threads help: both decoders release the interpreter lock
        with ThreadPoolExecutor(min(len(places), os.cpu_count() or 1) or 1) as pool:
            decoded = pool.map(work, [clips[i] for i in places], [plans[i] for i in places])
            for i, picture in zip(places, decoded, strict=True):
                found[i] = picture
    images = [i for i, plan in enumerate(plans) if isinstance(plan, _Plan) and plan.route == "image"]
    if images:
        _decode_dali_pictures(clips, images, found, device, notes)
    _decode_dali_videos(clips, plans, found, device, notes)
    return _fit(clips, found)


def _decode_dali_pictures(clips, images: list[int], found: list, device: str, notes: Notes) -> None:
    """Fills in the clips of route "image"; what DALI refuses, Pillow tries, and says why."""
    files = [np.fromfile(clips[i].path, np.uint8) for i in images]
    for i, pixels in zip(images, backend.pictures(files, device), strict=True):
        if pixels is None:
            found[i] = _or_rejected(_pillow_picture, clips[i], found[i], device, notes)
        else:
            found[i] = _Picture(pixels, pixels.shape[:2])


def _or_rejected(decode, clip: Clip, plan: _Plan, device: str, notes: Notes) -> _Picture | RejectedInput:
    try:
        return decode(clip, plan, device, notes)
    except RejectedInput as rejected:
        return rejected


def _pyav_picture(clip: Clip, plan: _Plan, device: str, notes: Notes) -> _Picture:
    taken = list(shots(plan.video, plan.indices, clip.policy, notes))
    return _Picture(backend.as_pixels(np.stack([shot.pixels for shot in taken]), device), taken[0].shown)


def _pillow_picture(clip: Clip, plan: _Plan, device: str, notes: Notes) -> _Picture:
    pixels = pictures.load(Path(clip.path), clip.policy, notes, 2 * max(clip.height, clip.width))
    return _Picture(backend.as_pixels(pixels, device), pixels.shape[:2])


def _decode_piecewise(clip: Clip, plan: _Plan, device: str, notes: Notes) -> Tensor | RejectedInput:
    """A clip whose frames are scaled as they come, so that never more than CHUNK_BYTES of
    them are held in their own size.
    """
    result, done, held = torch.empty(0), 0, []
    step = max(1, CHUNK_BYTES // max(1, plan.video.frame_bytes))
    try:
        for shot in shots(plan.video, plan.indices, clip.policy, notes):
            held.append(shot)
            if len(held) < step and done + len(held) < len(plan.indices):
                continue
            pixels = held[0].pixels[None] if len(held) == 1 else np.stack([s.pixels for s in held])
            (fitted,) = _fit([clip], [_Picture(backend.as_pixels(pixels, device), shot.shown)])
            if isinstance(fitted, RejectedInput):
                return fitted
            if len(held) == len(plan.indices):
                return fitted
            if not done:
                result = torch.empty(3, len(plan.indices), clip.height, clip.width)
            result[:, done : done + len(held)] = fitted
            done, held = done + len(held), []
            del pixels, shot
            gc.collect(1)
    except RejectedInput as rejected:
        return rejected
    return result


def _decode_dali_videos(clips, plans, found: list, device: str, notes: Notes) -> None:
    """Fills in the clips of route "video". Clips of one file are decoded from one copy of
    it; what DALI refuses, PyAV tries, and says why.
    """
    members: dict[object, list[int]] = {}
    for i, plan in enumerate(plans):
        if isinstance(plan, _Plan) and plan.route == "video":
            members.setdefault(Path(clips[i].path), []).append(i)
    if device == "gpu":
        members = {(path, i): [i] for path, numbers in members.items() for i in numbers}
    files = list(members.values())
    if not files:
        return
    indices = [sorted({index for i in file for index in plans[i].indices}) for file in files]
    jobs = [
        (np.fromfile(clips[file[0]].path, np.uint8), chosen)
        for file, chosen in zip(files, indices, strict=True)
    ]
    for file, chosen, frames in zip(files, indices, backend.videos(jobs, device), strict=True):
        for i in file:
            if frames is None:
                found[i] = _or_rejected(_pyav_picture, clips[i], plans[i], device, notes)
                continue
            own = frames
            if plans[i].indices != chosen:
                own = backend.some_frames(frames, np.searchsorted(chosen, plans[i].indices))
            found[i] = _Picture(own, own.shape[1:3])


def _fit(clips: Sequence[Clip], found: Sequence) -> list[Tensor | RejectedInput]:
    """Scales, crops and normalises the pictures; all that are treated alike together."""
    results: list = list(found)
    calls: dict[tuple, list[int]] = {}
    for i, (clip, picture) in enumerate(zip(clips, found, strict=True)):
        if isinstance(picture, RejectedInput):
            continue
        height, width = picture.shown
        scale = max(clip.height / height, clip.width / width)
        if scale > 1 and not clip.allow_upscale:
            remedy = (
                f"smaller than the bucket {clip.width}x{clip.height}; use a smaller bucket or "
                "allow_upscale=True"
            )
            results[i] = RejectedInput(clip.path, "size", f"{round(width)}x{round(height)}", remedy)
            continue
        shape = tuple(picture.pixels.shape)
        stretched = (shape, picture.shown) if shape[-3:-1] != tuple(picture.shown) else None
        calls.setdefault((clip.height, clip.width, len(shape), scale != 1, stretched), []).append(i)
    for (height, width, dimensions, scaled, stretched), members in calls.items():
        shown = stretched[1] if stretched else None
        pixels = backend.fitted([found[i].pixels for i in members], height, width, scaled, shown)
        for i, fitted in zip(members, pixels, strict=True):
            results[i] = fitted if dimensions == 4 else fitted[:, None]
    return results
