"""Turned, mirrored, stretched, interlaced and several-streamed videos against what a
player shows, worked out from the pictures that were written.
"""

from fractions import Fraction

import av
import numpy as np
import pytest

from megatron_apt.encode.decode import Clip, decode_clip
from megatron_apt.encode.geometry import Orientation, orientation, shown_size
from megatron_apt.encode.notes import Notes
from megatron_apt.encode.policy import PixelPolicy
from megatron_apt.encode.rejected import RejectedInput
from megatron_apt.encode.video import probe
from support.clips import frame_number, numbered_frames, write_video

COLOURS = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 220, 40)])


def quadrants(height: int = 64, width: int = 96) -> np.ndarray:
    picture = np.zeros((height, width, 3), np.uint8)
    rows, columns = np.mgrid[:height, :width]
    picture[:] = COLOURS[2 * (rows >= height // 2) + (columns >= width // 2)]
    return picture


def to_bytes(pixels) -> np.ndarray:
    return (pixels * 127.5 + 127.5).round().byte().permute(1, 2, 3, 0).numpy()


def corners(picture: np.ndarray) -> list[int]:
    height, width = picture.shape[:2]
    spots = [
        picture[y : y + 4, x : x + 4].reshape(-1, 3).mean(0) for y in (4, height - 8) for x in (4, width - 8)
    ]
    return [int(np.abs(COLOURS - spot).sum(1).argmin()) for spot in spots]


def write(path, pictures, codec: str, pix_fmt: str, matrix=None, options=None, **context):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], pix_fmt
        for field, value in context.items():
            setattr(stream.codec_context, field, value)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for picture in pictures:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format=pix_fmt))
            )
        container.mux(stream.encode(None))
    return path


# By the matrix's a, b, c, d: where NumPy puts the pixels.
TURNS = {
    (1, 0, 0, 1): lambda p: p,
    (0, 1, -1, 0): lambda p: np.rot90(p, -1),
    (-1, 0, 0, -1): lambda p: np.rot90(p, 2),
    (0, -1, 1, 0): lambda p: np.rot90(p),
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (0, 1, 1, 0): lambda p: p.swapaxes(0, 1),
    (0, -1, -1, 0): lambda p: np.rot90(p, 2).swapaxes(0, 1),
}


def matrix_bytes(a, b, c, d) -> bytes:
    return np.array([a * 65536, b * 65536, 0, c * 65536, d * 65536, 0, 0, 0, 1 << 30], np.int32).tobytes()


@pytest.mark.parametrize("entries", TURNS)
def test_orientations_move_pixels_as_the_matrix_says(entries):
    picture = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    turned = orientation(matrix_bytes(*entries))
    assert (turned.apply(picture) == TURNS[entries](picture)).all()
    assert turned.size(2, 3) == TURNS[entries](picture).shape[:2]
    assert orientation(matrix_bytes(*(3 * entry for entry in entries))) == turned


@pytest.mark.parametrize("entries", [(0.7071, 0.7071, -0.7071, 0.7071), (1, 0.5, 0, 1)])
def test_matrices_that_no_quarter_turn_makes(entries):
    with pytest.raises(ValueError, match=r"45 degrees|sheared"):
        orientation(matrix_bytes(*entries))


def test_pixel_aspects():
    assert orientation(matrix_bytes(0, 0, 0, 0)) == Orientation()
    assert shown_size(576, 720, Fraction(64, 45)) == (576, 1024) and shown_size(480, 640, Fraction(0)) == (
        480,
        640,
    )
    with pytest.raises(ValueError, match="1:1000"):
        shown_size(10, 10, Fraction(1, 1000))


@pytest.mark.parametrize(
    "codec, pix_fmt, name",
    [("libvpx-vp9", "yuv420p", "a.mp4"), ("mjpeg", "yuvj420p", "a.mov"), ("libx264", "yuv420p", "b.mp4")],
)
@pytest.mark.parametrize("entries", [(0, 1, -1, 0), (-1, 0, 0, 1), (0, -1, -1, 0)])
def test_display_matrices_on_every_route(tmp_path, codec, pix_fmt, name, entries):
    matrix = np.frombuffer(matrix_bytes(*entries), np.int32).tolist()
    path = write(
        tmp_path / name, [quadrants()] * 3, codec, pix_fmt, matrix, sample_aspect_ratio=Fraction(2, 1)
    )
    expected = TURNS[entries](quadrants(64, 192))
    height, width = expected.shape[:2]
    assert corners(to_bytes(decode_clip(Clip(path, height, width, 2)))[1]) == corners(expected)
    with pytest.raises(RejectedInput, match="smaller"):
        decode_clip(Clip(path, height + 2, width))


def test_a_circle_stays_a_circle(tmp_path):
    y, x = np.mgrid[:128, :128]
    disc = (
        np.where((((x - 64) / 28) ** 2 + ((y - 64) / 56) ** 2 < 1)[..., None], 220, 30)
        .astype(np.uint8)
        .repeat(3, 2)
    )
    path = write(tmp_path / "a.mp4", [disc] * 2, "libx264", "yuv420p", sample_aspect_ratio=Fraction(2, 1))
    rows, columns = np.nonzero(to_bytes(decode_clip(Clip(path, 64, 128)))[0, ..., 0] > 125)
    assert abs(np.ptp(rows) - 56) <= 2 and abs(np.ptp(columns) - 56) <= 2


def fields(k: int) -> np.ndarray:
    picture = np.full((64, 96, 3), 30, np.uint8)
    for field in (0, 1):
        picture[field::2, 4 * (2 * k + field) :][:, :8] = 220
    return picture


def test_interlaced_video(tmp_path):
    path = write(
        tmp_path / "a.mp4",
        [fields(k) for k in range(8)],
        "libx264",
        "yuv420p",
        options={"crf": "4", "x264-params": "tff=1"},
    )

    def combed(clip: Clip, notes: Notes) -> float:
        """Mean step between neighbouring rows of the third frame; those of a vertical bar are alike."""
        return np.abs(np.diff(to_bytes(decode_clip(clip, notes=notes))[2, ..., 0].astype(int), axis=0)).mean()

    notes = Notes()
    assert combed(Clip(path, 64, 96, 4), notes) < 1 and "deinterlaced" in notes.lines()[0]["note"]
    notes = Notes()
    assert (
        combed(Clip(path, 64, 96, 4, policy=PixelPolicy(interlaced="warn")), notes) > 10
        and "combed" in notes.lines()[0]["note"]
    )
    with pytest.raises(RejectedInput, match="interlaced"):
        decode_clip(Clip(path, 64, 96, 4, policy=PixelPolicy(interlaced="reject")))


def mux(path, sources, dispositions):
    with av.open(str(path), "w") as out:
        for source, disposition in zip(sources, dispositions, strict=True):
            with av.open(str(source)) as container:
                stream = out.add_stream_from_template(container.streams.video[0])
                stream.disposition = disposition
        for number, source in enumerate(sources):
            with av.open(str(source)) as container:
                for packet in container.demux(video=0):
                    if packet.size:
                        packet.stream = out.streams[number]
                        out.mux(packet)
    return path


def test_the_default_stream_is_taken(tmp_path):
    small = write(tmp_path / "small.mkv", [np.full((64, 96, 3), 255, np.uint8)] * 4, "libvpx-vp9", "yuv420p")
    big = write(tmp_path / "big.mkv", [quadrants(128, 192)] * 6, "libvpx-vp9", "yuv420p")
    both = mux(tmp_path / "both.mkv", [small, big], [av.stream.Disposition(0), av.stream.Disposition.default])
    assert corners(to_bytes(decode_clip(Clip(both, 64, 96, 6)))[5]) == [0, 1, 2, 3]


def test_joined_recordings_follow_each_other(tmp_path):
    one = write_video(tmp_path / "one.ts", numbered_frames(40), "libx264", options={"bf": "2", "g": "20"})
    joined = tmp_path / "joined.ts"
    joined.write_bytes(one.read_bytes() * 2)
    info = probe(joined)
    assert len(info.pts) == 80 and len(info.shifts) == 1
    pictures = to_bytes(decode_clip(Clip(joined, 64, 96, 8, start=36 / 25)))
    assert [frame_number(picture) for picture in pictures] == [36, 37, 38, 39, 0, 1, 2, 3]


def test_a_size_that_changes_is_said(tmp_path):
    frames = numbered_frames(10)
    parts = [
        write_video(tmp_path / "a.ivf", frames, "libvpx-vp9"),
        write_video(tmp_path / "b.ivf", frames[:, :32, :48], "libvpx-vp9"),
    ]
    with av.open(str(tmp_path / "c.webm"), "w") as out:
        with av.open(str(parts[0])) as container:
            stream = out.add_stream_from_template(container.streams.video[0])
        for k, part in enumerate(parts):
            with av.open(str(part)) as container:
                for packet in container.demux(video=0):
                    if packet.size:
                        packet.pts, packet.dts, packet.stream = (
                            packet.pts + 10 * k,
                            packet.dts + 10 * k,
                            stream,
                        )
                        out.mux(packet)
    assert decode_clip(Clip(tmp_path / "c.webm", 64, 96, 8)).shape == (3, 8, 64, 96)
    with pytest.raises(RejectedInput, match="changes within the clip: 96x64 then 48x32"):
        decode_clip(Clip(tmp_path / "c.webm", 64, 96, 15))
