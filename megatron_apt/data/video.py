"""Video files without their pixels: frames and timestamps as the container has them, the choice of frames, and PyAV as decoder of last resort."""

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from megatron_apt.data.rejected import RejectedInput


@dataclass(frozen=True, eq=False)
class VideoInfo:
    """What a container really holds, read from its packets.

    Attributes:
        codec: FFmpeg's name of the codec.
        frame_bytes: size of one decoded RGB frame.
        pts: (n,) presentation timestamps of the shown frames, ascending, in the stream's time base.
        times: (n,) the same in seconds, the first frame at 0.
        interval: median time between frames, in seconds (0 for a single frame).
        hidden: frames that the container asks not to show (edit lists), which shift DALI's frame indices.
    """

    path: Path
    codec: str
    frame_bytes: int
    pts: np.ndarray
    times: np.ndarray
    interval: float
    hidden: int


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
    """Frames and timestamps of the first video stream; nothing is decoded.

    Raises:
        RejectedInput: missing, empty, unreadable or truncated file, or no video in it.
    """
    path = Path(path)
    file_size(path)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise RejectedInput(path, "streams", "no video stream", "remove the file or give one with video")
            stream = container.streams.video[0]
            packets = [p for p in container.demux(stream) if p.size]
            promised, length = stream.frames, _promised_length(container)  # frames: 0 where the format does not say
            codec, time_base, frame_bytes = stream.codec_context.name, float(stream.time_base or 0), 3 * stream.width * stream.height
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, RejectedInput):
            raise
        raise RejectedInput(path, "container", _reason(error), "not a readable video; fetch it again or re-encode it") from None
    stamps = [p.dts if p.pts is None else p.pts for p in packets if not p.is_discard]
    if not stamps:
        raise RejectedInput(path, "frames", 0, "no frame can be read; the file is truncated or has none, fetch it again")
    if None in stamps:
        raise RejectedInput(path, "timestamps", "missing", "re-encode the file, for example to mp4")
    pts = np.unique(np.array(stamps, dtype=np.int64))
    times = (pts - pts[0]) * time_base
    gaps = np.diff(times)
    info = VideoInfo(path, codec, frame_bytes, pts, times, float(np.median(gaps)) if len(gaps) else 0.0, hidden=len(packets) - len(pts))
    # DALI would pad what is missing without a word. Players forgive a few frames; a file cut off by a broken download lacks more.
    damaged = "the file is truncated or damaged; fetch it again"
    if promised - len(packets) > max(2, 0.05 * promised) or any(p.is_corrupt for p in packets):
        raise RejectedInput(path, "frames", f"{len(packets)} readable of {promised}", damaged)
    end = max(times[-1], pts[-1] * time_base) + info.interval
    if length - end > max(0.05 * length, 1.5 * gaps.max(initial=0.0), 2 * info.interval):
        raise RejectedInput(path, "duration", f"frames until {end:.3f} s of {length:.3f} s", damaged)
    return info


def _promised_length(container: av.container.InputContainer) -> float:
    """Seconds the header announces; 0 where it does not say for the video alone: sound may run longer than the picture."""
    return container.duration / av.time_base if container.duration and len(container.streams) == 1 else 0.0


def choose_frames(info: VideoInfo, frames: int, stride: int = 1, fps: float = 0.0, start: float = 0.0) -> list[int]:
    """Indices, in presentation order, of `frames` frames from `start` seconds on.

    With fps the frame on screen at start + k / fps is taken, whatever the source's (even varying) rate; with fps = 0 every stride-th frame.
    The first frame is the first shown at or after start.

    Raises:
        RejectedInput: start behind the end, too few frames, or fps above the source's, which would repeat frames.
    """
    # A quarter of a frame absorbs timestamps that the container rounded (Matroska: to milliseconds).
    slack = info.interval / 4
    count = len(info.times)
    first = int(np.searchsorted(info.times, start - slack))
    if first >= count:
        raise RejectedInput(info.path, "start", start, f"the video ends after {info.times[-1] + info.interval:.3f} s; use a smaller start")
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
        remedy = f"too few at {wanted}, start={start:g}: {frames} are needed; use fewer, a longer video or a denser sampling"
        raise RejectedInput(info.path, "frames", available, remedy)
    if len(np.unique(chosen)) < frames:
        source = 1 / info.interval if info.interval else 0
        raise RejectedInput(info.path, "fps", fps, f"no frames at that fps: the source has {source:.3f} frames/s; use fps <= {source:.3f} or fps=0")
    return chosen.tolist()


def decode_with_pyav(info: VideoInfo, indices: list[int]) -> np.ndarray:
    """The chosen frames as (F, H, W, 3) uint8, rotated as the container asks.

    Raises:
        RejectedInput: a frame that is missing or damaged.
    """
    wanted = [int(info.pts[i]) for i in indices]
    damaged = f"the {info.codec} stream is damaged; fetch the file again or re-encode it"
    try:
        found = _decode_pts(info.path, set(wanted), seek=True)
        # Seeking may land behind references of the first frames (open GOPs, broken indices); from the start it cannot.
        if len(found) < len(set(wanted)):
            found = _decode_pts(info.path, set(wanted), seek=False)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise RejectedInput(info.path, "payload", _reason(error), damaged) from None
    missing = [i for i, pts in zip(indices, wanted, strict=True) if pts not in found]
    if missing:
        raise RejectedInput(info.path, "payload", f"frame {missing[0]} does not decode", damaged)
    frames = [found[pts] for pts in wanted]
    if len({frame.shape for frame in frames}) > 1:
        raise RejectedInput(info.path, "size", "changes within the clip", "choose another start or re-encode the file at one size")
    return np.ascontiguousarray(np.stack(frames))


def _decode_pts(path: Path, wanted: set[int], seek: bool) -> dict[int, np.ndarray]:
    found: dict[int, np.ndarray] = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        if seek:
            container.seek(min(wanted), stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.pts in wanted and not frame.is_corrupt:
                # Bilinear chroma, as DALI does it: the same colours on both routes, at a fifth of bicubic's time.
                picture = frame.to_ndarray(format="rgb24", interpolation="BILINEAR")
                found[frame.pts] = np.rot90(picture, frame.rotation // 90)
                if len(found) == len(wanted):
                    break
    return found


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
