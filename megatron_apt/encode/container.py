"""Video files opened by FFmpeg: only containers of video, and with an end.

FFmpeg goes by what a file holds, not by its name: a picture, a text, a playlist or a list
of other files called .mp4 would be opened as such.
"""

import contextlib
import io
from collections.abc import Generator
from pathlib import Path

import av

from megatron_apt.encode.kinds import VIDEO_SUFFIXES, suffix_of
from megatron_apt.encode.rejected import RejectedInput

# FFmpeg's demuxers that are asked. Not among them: those of pictures, text, subtitles,
# sound, bare pixels, devices, and those that open other files.
VIDEO_FORMATS = (
    "mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,asf_o,flv,live_flv,kux,ogg,mxf,gxf,dv,nut,rm,wtv,swf,yuv4mpegpipe,ivf,obu,av1,mjpeg,mpjpeg,"
    "h261,h263,h264,hevc,vvc,m4v,vc1,vc1test,nsv,mlv,dnxhd,dirac,cavsvideo,avs2,avs3,nuv,pva,ty,dhav,gif,apng"
)
MOST_BETWEEN = 128 << 20  # bytes: more than any frame of the largest video that is taken has


class Metered(io.FileIO):
    """A file that ends where more than MOST_BETWEEN bytes have been read without rest() in between."""

    since = 0

    def read(self, size: int | None = -1, /) -> bytes:
        if self.since > MOST_BETWEEN:
            return b""  # FFmpeg takes an exception for a damage that it can read on behind
        data = super().read(size)
        self.since += len(data)
        return data

    @contextlib.contextmanager
    def ended_named(self) -> Generator[None]:
        """Whatever FFmpeg makes of the end of a file that was ended here, it is named."""
        try:
            yield
        except Exception:
            self.rest()
            raise
        self.rest()

    def rest(self) -> None:
        """
        Raises:
            RejectedInput: the file was ended.
        """
        if self.since > MOST_BETWEEN:
            remedy = "the file is damaged, or was never written in full; fetch it again"
            raise RejectedInput(Path(str(self.name)), "payload", f"no frame in {MOST_BETWEEN} bytes", remedy)
        self.since = 0


def open_video(path: Path, file: Metered | None = None) -> av.container.InputContainer:
    """The file, or the file opened already, as a container of video.

    Raises:
        RejectedInput: it is none.
        av.FFmpegError, OSError, ValueError: it cannot be read.
    """
    # In pictures, frames in full depth are decoded by FFmpeg too.
    formats = VIDEO_FORMATS if suffix_of(path) in VIDEO_SUFFIXES else VIDEO_FORMATS + ",png_pipe"
    try:
        # With file: in front, a name such as concat:a.mp4 is a name, and asks FFmpeg for nothing.
        return av.open(file or f"file:{path}", "r", options={"format_whitelist": formats})
    except av.error.ArgumentError:
        remedy = (
            "a picture, text, playlist or sound under a video's name, or damaged; name it as what it is, or "
            "remove it"
        )
        raise RejectedInput(path, "container", "no video", remedy) from None
