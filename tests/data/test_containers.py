"""What is opened as video, by which route, and how far it is read."""

import os

import av
import numpy as np
import pytest
from PIL import Image

from megatron_apt.encode import container, decode, video
from megatron_apt.encode.decode import Clip, decode_clip
from megatron_apt.encode.rejected import RejectedInput
from support.clips import numbered_frames, write_video


@pytest.mark.parametrize("device", decode.DEVICES)
@pytest.mark.parametrize("name, route", [("a.avi", "pyav"), ("a.mkv", "video"), ("a.mov", "video")])
def test_no_avi_is_given_to_dali(tmp_path, device, name, route):
    path = write_video(tmp_path / name, numbered_frames(4), "mjpeg", {"q": "2"})
    assert decode._plan(Clip(path, 64, 96, 2), device).route == route
    renamed = path.rename(tmp_path / "b.mp4")  # by what it holds, not by its name
    assert decode._plan(Clip(renamed, 64, 96, 2), device).route == route


CONCAT = "ffconcat version 1.0\nfile a.mkv\n"
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.ts\n"
SUBTITLES = "1\n00:00:00,000 --> 00:00:01,000\nx\n\n" * 20


@pytest.mark.parametrize("text", [CONCAT, PLAYLIST, SUBTITLES])
def test_texts_are_no_videos(tmp_path, text):
    write_video(tmp_path / "a.mkv", numbered_frames(2), "mjpeg", {"q": "2"})
    (tmp_path / "b.mp4").write_text(text)
    with pytest.raises(RejectedInput, match=r"b\.mp4: container="):
        decode_clip(Clip(tmp_path / "b.mp4", 64, 96))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP"])
def test_pictures_under_a_videos_name(tmp_path, kind):
    Image.new("RGB", (96, 64)).save(tmp_path / "a.mp4", kind)
    os.truncate(tmp_path / "a.mp4", 5 << 30)
    with pytest.raises(RejectedInput, match=r"a\.mp4: (container|payload)="):
        decode_clip(Clip(tmp_path / "a.mp4", 64, 96))


@pytest.mark.parametrize(
    "name, codec", [("a.h264", "libx264"), ("a.mjpeg", "mjpeg"), ("a.m2v", "mpeg2video")]
)
def test_holes_are_not_read_to_their_end(tmp_path, monkeypatch, name, codec):
    monkeypatch.setattr(container, "MOST_BETWEEN", 16 << 20)
    path = write_video(tmp_path / name, numbered_frames(30), codec)
    decode_clip(Clip(path, 64, 96, 2))
    os.truncate(path, 1 << 40)
    with pytest.raises(RejectedInput, match="no frame in 16777216 bytes"):
        decode_clip(Clip(path, 64, 96, 2))


def test_sound_behind_the_last_frame_is_no_hole(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "MOST_BETWEEN", 1 << 20)
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        picture, sound = out.add_stream("mjpeg", rate=25), out.add_stream("pcm_s16le", rate=48000)
        picture.width, picture.height, picture.pix_fmt = 96, 64, "yuvj420p"
        out.mux(picture.encode(av.VideoFrame.from_ndarray(numbered_frames(1)[0], "rgb24")))
        for k in range(40):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 48000), np.int16), "s16", "stereo")
            samples.rate, samples.pts = 48000, 48000 * k
            out.mux(sound.encode(samples))
        out.mux(picture.encode(None))
    assert os.path.getsize(tmp_path / "a.mkv") > 7 << 20 and len(video.probe(tmp_path / "a.mkv").pts) == 1


def test_the_number_of_frames_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "MOST_PACKETS", 5)
    with pytest.raises(RejectedInput, match="frames=more than 5"):
        video.probe(write_video(tmp_path / "a.avi", numbered_frames(6), "mjpeg"))
