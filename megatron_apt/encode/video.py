"""Video files without their pixels: streams, frames and timestamps as the container has
them, and the choice of frames.
"""

import os
from array import array
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from megatron_apt.encode.coded_size import coded_size
from megatron_apt.encode.container import Metered, open_video
from megatron_apt.encode.rejected import RejectedInput

MOST_HEADER = 4096  # bytes of a packet in which a frame's size stands
COVERS = Disposition.attached_pic | Disposition.timed_thumbnails
# Whose headers list every frame; others promise a number that nobody keeps (AVI counts
# dropped frames)
COUNTED_FORMATS = ("mov", "mp4")
MOST_PACKETS = 1 << 22  # of one stream: 46 hours at 25 frames a second
MISSING = np.iinfo(np.int64).min
SET_BACK = 0.5  # seconds by which a clock goes back where recordings were joined
# Seconds of silence at which recordings of broadcasts are taken to be joined, as FFmpeg's
# tools do
GAP = 10.0


@dataclass(frozen=True, eq=False)
class VideoInfo:
    """What a container really holds, read from its packets.

    Attributes:
        codec: FFmpeg's name of the codec.
        frame_bytes: size of one decoded RGB frame.
        pts: (n,) presentation timestamps of the shown frames, ascending, in the stream's
            time base.
        times: (n,) the same in seconds, the first frame at 0.
        interval: median time between frames, in seconds (0 for a single frame).
        hidden: frames that the container asks not to show (edit lists), which shift
            DALI's frame indices.
        stream: index of the video stream in the container; alone: whether there is no
            other video beside it.
        aspect: width of a pixel over its height, if known. field_order: FFmpeg's number
            of what the container says of fields.
        alpha: a WebM file with an alpha channel.
        counted: the container does not say which frame is shown when; pts are the frames'
            numbers in the order the decoder gives them.
        container: FFmpeg's name of the file's format.
        size: of the file. one_size: whether all frames are of one size, as far as key
            frames say.
        shifts: (packet, offset) of joined recordings whose clock was set back: what is
            added to timestamps from that packet on.
    """

    path: Path
    codec: str
    frame_bytes: int
    pts: np.ndarray
    times: np.ndarray
    interval: float
    hidden: int
    stream: int = 0
    alone: bool = True
    aspect: Fraction | None = None
    field_order: int = 0
    alpha: bool = False
    counted: bool = False
    shifts: tuple[tuple[int, int], ...] = ()
    size: int = 0
    one_size: bool = True
    container: str = ""

    @property
    def seekable(self) -> bool:
        return not self.counted and not self.shifts

    def shift(self, packet: int) -> int:
        return next((offset for start, offset in reversed(self.shifts) if packet >= start), 0)


@dataclass(frozen=True)
class _Header:
    """What is said of the video stream outside its packets."""

    format: str
    codec: str
    frame_bytes: int
    time_base: float
    rate: float
    promised: int
    length: float
    stream: int
    alone: bool
    aspect: Fraction | None
    field_order: int
    alpha: bool
    reordered: bool


@dataclass(frozen=True, eq=False)
class _Packets:
    """Timestamps (n,) int64 of a stream's packets in the order of the file, MISSING where
    there is none; shown and corrupt are their flags.

    last: the latest timestamp of packets without a byte, which repeat a frame (AVI,
    Theora). one_size: as VideoInfo's.
    """

    pts: np.ndarray
    dts: np.ndarray
    shown: np.ndarray
    corrupt: np.ndarray
    last: int
    one_size: bool


def file_size(path: Path) -> int:
    """Size in bytes.

    Raises:
        RejectedInput: missing or empty file.
    """
    if not path.is_file():
        raise RejectedInput(path, "path", "no such file", "correct the manifest or put the file there")
    size = path.stat().st_size
    if size == 0:
        raise RejectedInput(path, "size", "0 bytes", "fetch the file again or remove it")
    return size


def probe(path: str | Path) -> VideoInfo:
    """Frames and timestamps of the default video stream; nothing is decoded. Asked again
    about an unchanged file, it remembers.

    Raises:
        RejectedInput: missing, empty, unreadable or truncated file, or no video in it.
    """
    path = Path(path)
    file_size(path)
    status = os.stat(path)
    return _probe(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=16)  # many clips of one file follow each other
def _probe(path: Path, size: int, _modified: int) -> VideoInfo:
    try:
        with Metered(path) as file, file.ended_named(), open_video(path, file) as container:
            stream = default_stream(path, container)
            header = _header(container, stream)
            packets = _read_packets(path, container, stream, file)
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, RejectedInput):
            raise
        raise RejectedInput(
            path, "container", reason(error), "not a readable video; fetch it again or re-encode it"
        ) from None
    pts, times, counted, shifts = _clock(header, packets)
    if not len(pts):
        raise RejectedInput(
            path, "frames", 0, "no frame can be read; the file is truncated or has none, fetch it again"
        )
    gaps = np.diff(times)
    info = VideoInfo(
        path,
        header.codec,
        header.frame_bytes,
        pts,
        times,
        float(np.median(gaps)) if len(gaps) else 0.0,
        len(packets.pts) - len(pts),
        header.stream,
        header.alone,
        header.aspect,
        header.field_order,
        header.alpha,
        counted,
        shifts,
        size,
        packets.one_size,
        header.format,
    )
    _check_whole(info, header, packets, gaps)
    return info


def default_stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    """The video that players show: the one marked default, or the largest.

    Never a cover or thumbnails.

    Raises:
        RejectedInput: there is none, or none that this FFmpeg decodes.
    """
    if not container.streams.video:
        raise RejectedInput(path, "streams", "no video stream", "remove the file or give one with video")
    videos = [stream for stream in container.streams.video if not stream.disposition & COVERS]
    if not videos:
        raise RejectedInput(
            path, "streams", "a cover picture, no video", "a song; remove the file or give one with video"
        )
    known = [stream for stream in videos if stream.codec_context is not None]
    if not known:
        raise RejectedInput(
            path,
            "codec",
            "unknown",
            "this FFmpeg has no decoder for it; re-encode the file, for example to H.264",
        )
    return max(
        known,
        key=lambda s: (
            bool(s.disposition & Disposition.default),
            s.width * s.height,
            s.frames != 1,
            -s.index,
        ),
    )


def _header(container: av.container.InputContainer, stream: av.VideoStream) -> _Header:
    kinds = container.format.name.split(",")
    listed = any(kind in COUNTED_FORMATS for kind in kinds)
    time_base = float(stream.time_base or 0)
    alone = len(container.streams) == 1
    # A container's length may be that of its sound; a stream's own is kept by AVI alone
    # (as a number of frames, dropped ones among them).
    length = container.duration / av.time_base if container.duration and alone else 0.0
    if "avi" in kinds and stream.duration:
        length = stream.duration * time_base
    return _Header(
        kinds[0],
        stream.codec_context.codec.canonical_name,
        3 * stream.width * stream.height,
        time_base,
        float(stream.average_rate or stream.guessed_rate or stream.base_rate or 25),
        stream.frames if listed else 0,
        length,
        stream.index,
        len(container.streams.video) == 1,
        stream.sample_aspect_ratio,
        stream.codec_context.field_order,
        stream.metadata.get("alpha_mode", "0") not in ("", "0"),
        bool(stream.codec_context.has_b_frames),
    )


def _read_packets(
    path: Path, container: av.container.InputContainer, stream: av.VideoStream, file: Metered
) -> _Packets:
    rows, last, sizes = array("q"), 0, set()  # numbers alone: packets hold their bytes
    for packet in container.demux():  # all streams: hours of sound may lie behind the last frame
        file.rest()
        if packet.stream_index != stream.index:
            continue
        stamps = [MISSING if stamp is None else stamp for stamp in (packet.pts, packet.dts)]
        if not packet.size:
            last = max(last, *stamps)
            continue
        rows.extend((*stamps, not packet.is_discard, packet.is_corrupt, packet.is_keyframe))
        if len(rows) > 5 * MOST_PACKETS:
            raise RejectedInput(
                path, "frames", f"more than {MOST_PACKETS}", "too long for one file; cut it into parts"
            )
        if packet.is_keyframe and len(sizes) < 4:
            sizes.add(coded_size(stream.codec_context.name, memoryview(packet)[:MOST_HEADER]))
    pts, dts, shown, corrupt, keys = np.array(rows, np.int64).reshape(-1, 5).T
    return _Packets(
        pts, dts, (shown > 0) & _decodable(pts, keys > 0), corrupt > 0, last, len(sizes - {None}) < 2
    )


def _decodable(pts: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Recordings of broadcasts begin between key frames: what comes, or is shown, before
    the first cannot be decoded.
    """
    if not keys.any():
        return np.ones(len(keys), bool)
    first = int(np.argmax(keys))
    return (np.arange(len(keys)) >= first) & ((pts == MISSING) | (pts >= pts[first]) | (first == 0))


def _clock(
    header: _Header, packets: _Packets
) -> tuple[np.ndarray, np.ndarray, bool, tuple[tuple[int, int], ...]]:
    """(pts, times, counted, shifts) of VideoInfo."""
    stamps = np.where(packets.pts == MISSING, packets.dts, packets.pts)
    known = (stamps != MISSING) & packets.shown
    count = int(np.sum(packets.shown))
    # Bare streams (.h264) have no time at all; AVI has decoding times only, from which
    # FFmpeg guesses wrongly where frames are reordered.
    if np.sum(known) < count - max(2, 0.05 * count):
        return np.arange(count), np.arange(count) / header.rate, True, ()
    if header.format == "avi" and header.reordered:
        moments = np.sort(stamps[packets.shown])
        return np.arange(count), (moments - moments[0]) * header.time_base, True, ()
    shifts = _shifts(header, packets, stamps, known)
    for start, offset in shifts:
        end = next((later for later, _ in shifts if later > start), len(stamps))
        stamps[start:end] += np.where(known[start:end], offset, 0)
    pts = np.unique(stamps[known])
    return pts, (pts - pts[:1]) * header.time_base, False, shifts


def _shifts(
    header: _Header, packets: _Packets, stamps: np.ndarray, known: np.ndarray
) -> tuple[tuple[int, int], ...]:
    """Where the clock is set back (joined recordings), and what makes the later part follow the earlier."""
    # Decoding times: they rise throughout a file, where presentation times need not
    numbers = np.flatnonzero(packets.dts != MISSING)
    steps = np.diff(packets.dts[numbers])
    step = int(np.median(steps[steps > 0])) if np.any(steps > 0) else 0
    jumps = steps * header.time_base < -SET_BACK
    if header.format == "mpegts":
        jumps |= steps * header.time_base > GAP
    starts = numbers[np.flatnonzero(jumps) + 1]
    shifts: list[tuple[int, int]] = []
    for k, start in enumerate(starts):
        begin, end = (starts[k - 1] if k else 0), (starts[k + 1] if k + 1 < len(starts) else len(stamps))
        earlier, later = stamps[begin:start][known[begin:start]], stamps[start:end][known[start:end]]
        if len(earlier) and len(later):
            shifts.append(
                (int(start), int(earlier.max() + (shifts[-1][1] if shifts else 0) + step - later.min()))
            )
    return tuple(shifts)


def _check_whole(info: VideoInfo, header: _Header, packets: _Packets, gaps: np.ndarray) -> None:
    """
    Raises:
        RejectedInput: DALI would pad what is missing without a word. Players forgive a
            few frames; a file cut off by a broken download lacks more.
    """
    damaged = "the file is truncated or damaged; fetch it again"
    count, corrupt = len(packets.pts), int(packets.corrupt.sum())
    if header.promised - count > max(2, 0.05 * header.promised):
        raise RejectedInput(info.path, "frames", f"{count} readable of {header.promised}", damaged)
    # Broadcasts begin, end and are joined in the middle of packets; elsewhere the last
    # packet is cut because the file is.
    if corrupt > max(2, 0.05 * count) or (header.format != "mpegts" and corrupt):
        raise RejectedInput(info.path, "frames", f"{corrupt} of {count} damaged", damaged)
    end = info.times[-1] + info.interval
    if not (info.counted or info.shifts):
        end = max(end, max(info.pts[-1], packets.last) * header.time_base + info.interval)
    if header.length - end > max(0.05 * header.length, 1.5 * gaps.max(initial=0.0), 2 * info.interval):
        raise RejectedInput(
            info.path, "duration", f"frames until {end:.3f} s of {header.length:.3f} s", damaged
        )


def choose_frames(
    info: VideoInfo, frames: int, stride: int = 1, fps: float = 0.0, start: float = 0.0
) -> list[int]:
    """Indices, in presentation order, of `frames` frames from `start` seconds on.

    With fps the frame on screen at start + k / fps is taken, whatever the source's (even
    varying) rate; with fps = 0 every stride-th frame. The first frame is the first shown
    at or after start.

    Raises:
        RejectedInput: start behind the end, too few frames, or fps above the source's,
            which would repeat frames.
    """
    # A quarter of a frame absorbs timestamps that the container rounded (Matroska: to milliseconds).
    slack = info.interval / 4
    count = len(info.times)
    first = int(np.searchsorted(info.times, start - slack))
    if first >= count:
        raise RejectedInput(
            info.path,
            "start",
            start,
            f"the video ends after {info.times[-1] + info.interval:.3f} s; use a smaller start",
        )
    if fps == 0:
        chosen = first + stride * np.arange(frames)
        available = (count - first + stride - 1) // stride
    else:
        targets = info.times[first] + np.arange(frames) / fps
        chosen = np.searchsorted(info.times, targets + slack, side="right") - 1
        end = info.times[-1] + info.interval
        available = int(np.sum(targets < end - slack)) or 1
    if available < frames:
        wanted = f"fps={fps:g}" if fps else f"stride={stride}"
        remedy = (
            f"too few at {wanted}, start={start:g}: {frames} are needed; use fewer, a longer video or a "
            "denser sampling"
        )
        raise RejectedInput(info.path, "frames", available, remedy)
    if len(np.unique(chosen)) < frames:
        source = 1 / info.interval if info.interval else 0
        raise RejectedInput(
            info.path,
            "fps",
            fps,
            f"no frames at that fps: the source has {source:.3f} frames/s; use fps <= {source:.3f} or fps=0",
        )
    return chosen.tolist()


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
