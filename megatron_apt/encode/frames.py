"""Frames of a video by PyAV, as players show them: upright, deinterlaced, in RGB, one at a time."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import av
import numpy as np
from av.filter import Graph

from megatron_apt.encode.colour import dali_converts_it, refuse_dolby_vision, side_data, to_rgb
from megatron_apt.encode.container import open_video
from megatron_apt.encode.geometry import UPRIGHT, Orientation, orientation, shown_size
from megatron_apt.encode.notes import Notes
from megatron_apt.encode.policy import PixelPolicy
from megatron_apt.encode.rejected import RejectedInput
from megatron_apt.encode.video import VideoInfo, reason

# Codecs whose bitstream says nothing of fields: there the container is asked.
FIELDLESS = frozenset(
    {
        "vp8",
        "vp9",
        "libvpx",
        "libvpx-vp9",
        "av1",
        "libdav1d",
        "ffv1",
        "huffyuv",
        "ffvhuff",
        "utvideo",
        "rawvideo",
        "png",
        "mjpeg",
    }
)
TOP_FIRST, BOTTOM_FIRST = (2, 5), (3, 4)  # FFmpeg's field orders, by the field that is shown first
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders drop WebM's alpha channel
WIDE_FRAME = 8 << 20  # pixels from which frames are decoded by one thread: each thread holds several


@dataclass(frozen=True, eq=False)
class Shot:
    """One frame: pixels (H, W, 3) uint8, upright; shown: (height, width) in square pixels."""

    pixels: np.ndarray
    shown: tuple[float, float]


def shots(info: VideoInfo, indices: list[int], policy: PixelPolicy, notes: Notes) -> Iterator[Shot]:
    """The chosen frames (ascending indices), decoded as they are asked for.

    Raises:
        RejectedInput: a frame that is missing, damaged, of another size than the first,
            or that the policy does not want.
    """
    shape, turned = None, UPRIGHT
    damaged = f"the {info.codec} stream is damaged; fetch the file again or re-encode it"
    try:
        for neighbours in _chosen(info, indices, damaged):
            # Once: side data tie a frame to itself, so that its memory waits for the
            # garbage collector
            if shape is None:
                turned = _orientation(info, neighbours[1])
                refuse_dolby_vision(neighbours[1], info.path)
            shot = _shot(info, *neighbours, turned, policy, notes)
            shape = shape or shot.pixels.shape
            if shot.pixels.shape != shape:
                sizes = "{1}x{0} then {3}x{2}".format(*shape[:2], *shot.pixels.shape[:2])
                raise RejectedInput(
                    info.path,
                    "size",
                    f"changes within the clip: {sizes}",
                    "choose another start or re-encode the file at one size",
                )
            yield shot
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, RejectedInput):
            raise
        raise RejectedInput(info.path, "payload", reason(error), damaged) from None


def decode_with_pyav(info: VideoInfo, indices: list[int], policy: PixelPolicy | None = None) -> np.ndarray:
    """The chosen frames together: (F, H, W, 3) uint8.

    Raises:
        RejectedInput: as shots does.
    """
    return np.stack([shot.pixels for shot in shots(info, indices, policy or PixelPolicy(), Notes())])


@lru_cache(maxsize=256)
def is_plain(info: VideoInfo) -> bool:
    """Whether the first frame is shown as decoded: upright, square pixels, progressive,
    opaque, in colours that DALI converts.
    """
    try:
        with open_video(info.path) as container:
            stream = cast(av.VideoStream, container.streams[info.stream])
            frame = next(container.decode(stream))
            upright = _orientation(info, frame) == UPRIGHT and info.aspect in (None, 0, 1)
            return upright and not _interlaced(info, frame) and not info.alpha and dali_converts_it(frame)
    except (av.FFmpegError, OSError, ValueError, StopIteration):
        return False  # PyAV's own decoding says what is wrong


def _shot(
    info: VideoInfo,
    before,
    frame: av.VideoFrame,
    after,
    turned: Orientation,
    policy: PixelPolicy,
    notes: Notes,
) -> Shot:
    if frame.width * frame.height > policy.most_frame_pixels:
        remedy = (
            f"larger than most_pixels / 4 = {policy.most_frame_pixels} pixels; scale the video down or raise "
            "most_pixels"
        )
        raise RejectedInput(info.path, "size", f"{frame.width}x{frame.height}", remedy)
    try:
        shown = shown_size(frame.height, frame.width, info.aspect)
    except ValueError as error:
        raise RejectedInput(
            info.path,
            "pixel aspect",
            str(error),
            "no camera has such pixels; re-encode the file with the right aspect",
        ) from None
    if _interlaced(info, frame):
        frame = _without_fields(info, before, frame, after, policy, notes)
    pixels = turned.apply(to_rgb(frame, info.path, policy, notes))
    return Shot(np.ascontiguousarray(pixels), turned.size(*shown))


def _orientation(info: VideoInfo, frame: av.VideoFrame) -> Orientation:
    matrix = next((data for name, data in side_data(frame) if name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return UPRIGHT
    try:
        return orientation(matrix)
    except (ValueError, struct.error) as error:
        remedy = "only quarter turns and mirrorings can be shown upright; re-encode the file turned"
        raise RejectedInput(info.path, "display matrix", str(error), remedy) from None


def _interlaced(info: VideoInfo, frame: av.VideoFrame) -> bool:
    return frame.interlaced_frame or (
        info.codec in FIELDLESS and info.field_order in (*TOP_FIRST, *BOTTOM_FIRST)
    )


def _without_fields(
    info: VideoInfo, before, frame: av.VideoFrame, after, policy: PixelPolicy, notes: Notes
) -> av.VideoFrame:
    if policy.interlaced == "reject":
        remedy = "interlaced, and interlaced='reject'; use interlaced='deinterlace', or deinterlace it first"
        raise RejectedInput(info.path, "interlaced", "fields", remedy)
    if policy.interlaced == "warn":
        notes.add(info.path, "interlaced, taken as it is: what moves is combed")
        return frame
    notes.add(info.path, "interlaced, deinterlaced")
    parity = "auto" if frame.interlaced_frame else "tff" if info.field_order in TOP_FIRST else "bff"
    return deinterlaced(before, frame, after, parity)


def deinterlaced(
    before: av.VideoFrame | None, frame: av.VideoFrame, after: av.VideoFrame | None, parity: str = "auto"
) -> av.VideoFrame:
    """The frame with the lines of its later field drawn anew, from its neighbours too
    where there are any of its kind.
    """
    alike = [
        f
        for f in (before, frame, after)
        if f is not None
        and (f.format.name, f.width, f.height) == (frame.format.name, frame.width, frame.height)
    ]
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )
    graph.link_nodes(
        source,
        graph.add("bwdif" if len(alike) == 3 else "yadif", f"mode=send_frame:parity={parity}:deint=all"),
        graph.add("buffersink"),
    )
    graph.configure()
    for neighbour in (*alike, None):
        graph.vpush(neighbour)
    results = []
    while len(results) <= alike.index(frame):
        results.append(graph.vpull())
    result = results[-1]
    for field in ("colorspace", "color_range", "color_trc", "color_primaries"):
        setattr(result, field, getattr(frame, field))
    return result


def _chosen(info: VideoInfo, indices: list[int], damaged: str) -> Iterator[tuple]:
    """(frame before or None, chosen frame, frame after or None); neighbours only of interlaced frames."""
    wanted = [int(info.pts[i]) for i in indices]
    frames = _decoded(info, wanted[0])
    left = list(zip(indices, wanted, strict=True))[::-1]
    before = waiting = None
    for pts, frame in frames:
        if waiting:
            yield (*waiting, frame)
            waiting = None
        if left and pts > left[-1][1]:
            raise RejectedInput(info.path, "payload", f"frame {left[-1][0]} does not decode", damaged)
        if left and pts == left[-1][1] and not frame.is_corrupt:
            left.pop()
            if _interlaced(info, frame):
                waiting = before, frame
            else:
                yield None, frame, None
        if not left and not waiting:
            return
        before = frame
    if waiting:
        yield (*waiting, None)
    if left:
        raise RejectedInput(info.path, "payload", f"frame {left[-1][0]} does not decode", damaged)


def _decoded(info: VideoInfo, first: int) -> Iterator[tuple[int, av.VideoFrame]]:
    """(timestamp, frame) in the order they are shown, from the frame at `first` or before it."""
    if info.seekable:
        # Seeking may land behind references of the first frames (open GOPs, broken
        # indices); from the start it cannot.
        frames = _decoded_from(info, first)
        try:
            before = []
            for pts, frame in frames:
                if pts >= first:
                    if pts > first or frame.is_corrupt:
                        break
                    yield from before
                    yield pts, frame
                    yield from frames
                    return
                before = [(pts, frame)]
        except av.FFmpegError:
            pass
    yield from _decoded_from(info, None)


def _decoded_from(info: VideoInfo, start: int | None) -> Iterator[tuple[int, av.VideoFrame]]:
    with open_video(info.path) as container:
        stream = cast(av.VideoStream, container.streams[info.stream])
        decoder = _decoder(info, stream)
        if start is not None:
            container.seek(start, stream=stream, backward=True)
        shown = 0
        for packet in _packets(info, container, stream):
            for frame in decoder.decode(packet):
                pts = shown if info.counted else frame.pts
                shown += 1
                if pts is not None:
                    yield pts, frame


def _packets(
    info: VideoInfo, container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[av.Packet | None]:
    """The stream's packets with the timestamps of info.pts, then None, which empties the decoder."""
    number = 0
    for packet in container.demux(stream):
        if packet.size:  # AVI's dropped frames are packets without a byte, which would be taken for the end
            shift = info.shift(number)
            if shift:
                packet.pts, packet.dts = (
                    None if stamp is None else stamp + shift for stamp in (packet.pts, packet.dts)
                )
            number += 1
            yield packet
    yield None


def _decoder(info: VideoInfo, stream: av.VideoStream) -> av.VideoCodecContext:
    decoder = stream.codec_context
    if info.alpha and info.codec in ALPHA_DECODERS:
        decoder = cast(av.VideoCodecContext, av.CodecContext.create(ALPHA_DECODERS[info.codec], "r"))
        decoder.extradata = stream.codec_context.extradata
    decoder.thread_type = "AUTO"
    if stream.width * stream.height >= WIDE_FRAME:
        decoder.thread_count = 1
    return decoder
