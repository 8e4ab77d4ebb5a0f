"""Pictures and clips of every kind that Pillow and PyAV can write here, small and valid, for damage."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 32  # pixels of each side
PICTURES = {
    "rgb.png": ("RGB", "PNG", {}),
    "alpha.png": ("RGBA", "PNG", {}),
    "palette.png": ("P", "PNG", {}),
    "grey16.png": ("I;16", "PNG", {}),
    "plain.jpg": ("RGB", "JPEG", {}),
    "progressive.jpg": ("RGB", "JPEG", {"progressive": True, "quality": 95}),
    "cmyk.jpg": ("CMYK", "JPEG", {}),
    "exif.jpg": (
        "RGB",
        "JPEG",
        {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"},
    ),
    "plain.webp": ("RGB", "WEBP", {}),
    "lossless.webp": ("RGBA", "WEBP", {"lossless": True}),
    "plain.bmp": ("RGB", "BMP", {}),
    "plain.tif": ("RGB", "TIFF", {}),
    "lzw.tiff": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    "plain.gif": ("P", "GIF", {}),
    "plain.avif": ("RGB", "AVIF", {}),
}
CLIPS = {
    "h264.mp4": ("libx264", "yuv420p"),
    "mpeg4.mp4": ("mpeg4", "yuv420p"),
    "mjpeg.mov": ("mjpeg", "yuvj420p"),
    "h264.mkv": ("libx264", "yuv420p"),
    "ffv1.mkv": ("ffv1", "yuv420p"),
    "vp9.webm": ("libvpx-vp9", "yuv420p"),
    "vp8.webm": ("libvpx", "yuv420p"),
    "mpeg4.avi": ("mpeg4", "yuv420p"),
    "mjpeg.avi": ("mjpeg", "yuvj420p"),
    "mpeg2.ts": ("mpeg2video", "yuv420p"),
    "mpeg1.mpg": ("mpeg1video", "yuv420p"),
    "flv1.flv": ("flv", "yuv420p"),
    "wmv2.wmv": ("wmv2", "yuv420p"),
    "clip.gif": ("gif", "rgb8"),
}
FRAMES = 12


def _texture(seed: int) -> np.ndarray:
    """(SIZE, SIZE, 3) uint8, smooth."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 5, 3))
    return np.kron(coarse, np.ones((8, 8, 1)))[:SIZE, :SIZE].astype(np.uint8)


def write_picture(path: Path, seed: int = 0, mode: str = "RGB", kind: str = "PNG", **options) -> Path:
    from PIL import Image

    picture = Image.fromarray(_texture(seed))
    if mode == "I;16":
        picture = Image.fromarray(_texture(seed)[..., 0].astype(np.uint16) * 256)
    elif mode != "RGB":
        picture = picture.convert(mode)
    picture.save(path, kind, **options)
    return path


def write_pictures(folder: Path) -> None:
    """One of each kind; kinds that this Pillow cannot write are left out."""
    folder.mkdir(parents=True)
    for i, (name, (mode, kind, options)) in enumerate(PICTURES.items()):
        try:
            write_picture(folder / name, i, mode, kind, **options)
        except (KeyError, OSError):
            (folder / name).unlink(missing_ok=True)


def write_clip(path: Path, codec: str, pixels: str, frames: int = FRAMES) -> Path:
    import av

    base = _texture(7)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.width = stream.height = SIZE
        stream.pix_fmt = pixels
        stream.codec_context.gop_size = 6
        for k in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(base, 2 * k, axis=1), format="rgb24").reformat(
                format=pixels
            )
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_clips(folder: Path) -> None:
    """One of each kind; codecs that this FFmpeg cannot write are left out."""
    import av

    folder.mkdir(parents=True)
    for name, (codec, pixels) in CLIPS.items():
        try:
            write_clip(folder / name, codec, pixels)
        except (av.FFmpegError, ValueError, OSError):
            (folder / name).unlink(missing_ok=True)


def png(
    width: int,
    height: int,
    data: bytes,
    depth: int = 8,
    colour: int = 2,
    chunks: tuple[tuple[bytes, bytes], ...] = (),
) -> bytes:
    """A PNG file whose header says what one likes; data is compressed already."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = ((b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


def zeros(size: int) -> bytes:
    """So many zeros, compressed."""
    packer, out = zlib.compressobj(9), io.BytesIO()
    for _ in range(size >> 20):
        out.write(packer.compress(bytes(1 << 20)))
    out.write(packer.compress(bytes(size & (1 << 20) - 1)))
    return out.getvalue() + packer.flush()
