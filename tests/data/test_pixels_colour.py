"""Colours of videos and pictures against conversions written out here: matrix, range,
HDR, transparency, depth, orientation.
"""

import av
import numpy as np
import pytest
from PIL import Image

from megatron_apt.encode import hdr
from megatron_apt.encode.decode import Clip, decode_clip
from megatron_apt.encode.notes import Notes
from megatron_apt.encode.pictures import _reduced_by_bands
from megatron_apt.encode.policy import PixelPolicy
from megatron_apt.encode.rejected import RejectedInput

# Red and blue, by H.273's number of the matrix
WEIGHTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}
COLOUR = np.array([200, 30, 30])


def to_bytes(pixels) -> np.ndarray:
    return (pixels * 127.5 + 127.5).round().byte().permute(1, 2, 3, 0).numpy()


def yuv(rgb, matrix: int, full: bool, bits: int) -> list[int]:
    """ITU-T H.273, 8.3, written out."""
    red, blue = WEIGHTS[matrix]
    r, g, b = np.asarray(rgb) / 255
    luma = red * r + (1 - red - blue) * g + blue * b
    chroma = (b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)
    peak, scale = 2**bits - 1, 2 ** (bits - 8)
    if full:
        return [round(luma * peak), *(round(c * peak + 2 ** (bits - 1)) for c in chroma)]
    return [round(scale * (219 * luma + 16)), *(round(scale * (224 * c + 128)) for c in chroma)]


def plain_video(path, codec: str, pix_fmt: str, values, **context):
    with av.open(str(path), "w") as container:
        options = {"lossless": "1"} if codec == "libvpx-vp9" else {"crf": "4"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, pix_fmt
        for field, value in context.items():
            setattr(stream.codec_context, field, value)
        for _ in range(3):
            frame = av.VideoFrame(96, 64, pix_fmt)
            for plane, value in zip(frame.planes, values, strict=True):
                kind = np.uint16 if "10" in pix_fmt or "12" in pix_fmt else np.uint8
                plane.update(np.full(plane.buffer_size // kind().itemsize, value, kind).tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("matrix", WEIGHTS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "codec, pix_fmt, bits",
    [("libvpx-vp9", "yuv420p", 8), ("libvpx-vp9", "yuv444p", 8), ("ffv1", "yuv422p10le", 10)],
)
def test_matrix_and_range_are_the_files(tmp_path, codec, pix_fmt, bits, matrix, full):
    path = plain_video(
        tmp_path / "a.mkv",
        codec,
        pix_fmt,
        yuv(COLOUR, matrix, full, bits),
        colorspace=matrix,
        color_range=1 + full,
    )
    assert np.abs(to_bytes(decode_clip(Clip(path, 64, 96, 2))).astype(int) - COLOUR).max() <= 3


def test_what_is_tagged_nowhere_is_bt601(tmp_path):
    path = plain_video(tmp_path / "a.mkv", "libx264", "yuv420p", yuv(COLOUR, 5, False, 8))
    assert np.abs(to_bytes(decode_clip(Clip(path, 64, 96))).astype(int) - COLOUR).max() <= 3


def pq_signal(nits):
    """Inverse of the PQ curve (SMPTE ST 2084, 5.1)."""
    y = (np.asarray(nits) / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def graded(rgb) -> np.ndarray:
    """PQ signal in BT.2020 of an SDR colour whose white is 203 cd/m2; the matrix is BT.2087's."""
    light = (np.asarray(rgb) / 255) ** 2.4
    wide = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]) @ light
    return pq_signal(203 * wide)


def test_pq_comes_back_as_it_was_graded(tmp_path):
    values = yuv(255 * graded(COLOUR), 9, False, 10)
    path = plain_video(
        tmp_path / "a.mkv",
        "ffv1",
        "yuv420p10le",
        values,
        colorspace=9,
        color_range=1,
        color_trc=16,
        color_primaries=9,
    )
    notes = Notes()
    assert np.abs(to_bytes(decode_clip(Clip(path, 64, 96, 2), notes=notes)).astype(int) - COLOUR).max() <= 4
    assert notes.lines() == [{"file": str(path), "note": "HDR (PQ), tone-mapped to SDR"}]
    with pytest.raises(RejectedInput, match="hdr=PQ"):
        decode_clip(Clip(path, 64, 96, policy=PixelPolicy(hdr="reject")))
    decode_clip(Clip(path, 64, 96, policy=PixelPolicy(hdr="warn")), notes=notes)
    assert any("washed out" in line["note"] for line in notes.lines())


def test_tone_curves():
    assert hdr.pq_light(pq_signal([0.1, 100, 203, 4000])) == pytest.approx([0.1, 100, 203, 4000], rel=1e-5)
    # BT.2100: HLG's half signal is 1/12 of the scene light, and 75 % on a display of 1000
    # cd/m2 is its reference white.
    assert hdr.hlg_scene(np.array([0.5, 1.0])) == pytest.approx([1 / 12, 1.0], abs=1e-4)
    white = hdr.to_sdr(np.full((1, 1, 3), round(0.75 * 65535), np.uint16), hdr.HLG)
    assert white.tolist() == [[[244, 244, 244]]]
    light = np.linspace(0, 60, 5000)
    rolled = hdr.roll_off(light)
    assert (
        (np.diff(rolled) > 0).all()
        and rolled.max() < 1
        and (rolled[light <= 0.8] == light[light <= 0.8]).all()
    )


@pytest.mark.parametrize(
    "suffix, options", [("png", {}), ("webp", {"lossless": True, "exact": True}), ("tif", {}), ("gif", {})]
)
@pytest.mark.parametrize("background, expected", [("white", (255, 255, 255)), ("#102030", (16, 32, 48))])
def test_hidden_colours_never_show(tmp_path, suffix, options, background, expected):
    pixels = np.full((64, 96, 4), 255, np.uint8)
    pixels[..., :3] = COLOUR
    pixels[:32] = 255, 0, 255, 0
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **options)
    picture = to_bytes(
        decode_clip(Clip(tmp_path / f"a.{suffix}", 64, 96, policy=PixelPolicy(background=background)))
    )[0]
    assert (picture[:32] == expected).all() and np.abs(picture[32:].astype(int) - COLOUR).max() <= 1


TURNED = {
    2: np.fliplr,
    3: lambda p: np.rot90(p, 2),
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    8: np.rot90,
}


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "jpg"])
@pytest.mark.parametrize("number", TURNED)
def test_exif_orientation(tmp_path, suffix, number):
    pixels = np.add.outer(np.arange(64), np.arange(96))[..., None].repeat(3, 2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = number
    Image.fromarray(pixels).save(
        tmp_path / f"a.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {})
    )
    expected = TURNED[number](pixels)
    picture = to_bytes(decode_clip(Clip(tmp_path / f"a.{suffix}", *expected.shape[:2])))[0]
    assert np.abs(picture.astype(int) - expected).max() <= (4 if suffix == "jpg" else 0)


def test_16_bits_are_scaled_not_cut(tmp_path):
    grey = np.linspace(0, 65535, 64 * 96).reshape(64, 96).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    picture = to_bytes(decode_clip(Clip(tmp_path / "a.png", 64, 96)))[0]
    assert (picture == np.round(grey / 257).astype(int)[..., None]).all()


def test_pictures_are_refused_by_their_header_alone(tmp_path):
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    with pytest.raises(RejectedInput, match=r"300x200.*most_pixels=50000"):
        decode_clip(Clip(tmp_path / "a.png", 64, 96, policy=PixelPolicy(most_pixels=50000)))
    (tmp_path / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(RejectedInput, match="not a picture"):
        decode_clip(Clip(tmp_path / "b.png", 64, 96))


@pytest.mark.parametrize(
    "change", [{"background": "no colour"}, {"hdr": "x"}, {"interlaced": "x"}, {"most_pixels": 0}]
)
def test_policies_name_what_is_wrong(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        PixelPolicy(**change)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_large_transparent_pictures_are_reduced_in_bands_as_they_would_be_whole(mode):
    draw = np.random.default_rng(0)
    picture = Image.fromarray(draw.integers(0, 256, (400, 37, 4), dtype=np.uint8), "RGBA")
    picture = picture.quantize(16, Image.Quantize.FASTOCTREE) if mode == "P" else picture.convert(mode)
    whole = picture.convert("RGBA").convert("RGBa").reduce(3).convert("RGBA")
    assert np.array_equal(np.asarray(_reduced_by_bands(picture, 3)), np.asarray(whole))
