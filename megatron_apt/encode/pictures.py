"""Still pictures: what their headers say before anything is decoded, a strict check, and
Pillow's decoding of the kinds that DALI shows wrongly.

DALI's decoder is right for opaque 8-bit grey and RGB pictures in sRGB that need no
turning. The others (transparency, palettes, 16 bits, CMYK, colour profiles, EXIF
orientation, TIFF and rarer formats) are decoded here.
"""

import io
import os
import struct
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from megatron_apt.encode.colour import compose
from megatron_apt.encode.hdr import HLG, PQ
from megatron_apt.encode.notes import Notes
from megatron_apt.encode.policy import PixelPolicy
from megatron_apt.encode.rejected import RejectedInput

# Formats that are opened, whatever a file is called. Not among them: those that Pillow
# hands to other programs (EPS) or that are no pictures.
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "TIFF",
    "GIF",
    "AVIF",
    "JPEG2000",
    "PPM",
    "TGA",
    "QOI",
    "SGI",
    "PCX",
    "DDS",
    "SUN",
)
DALI_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP")
MOVING = ("GIF", "PNG", "AVIF")  # animations that FFmpeg decodes
# Of PNG, which libpng says nothing about
QUIET_CHUNKS = frozenset(b"IHDR PLTE IDAT IEND sRGB gAMA cHRM pHYs tEXt zTXt iTXt tIME bKGD sBIT".split())
DALI_FILE_BYTES = 64 << 20  # DALI reads files whole
# Pixels from which a picture is made smaller as it is read, to hold it once and not in
# four copies
LARGE = 32 << 20
COSTS = {"AVIF": 2, "WEBP": 2, "JPEG2000": 4}  # decoders that hold a picture so many times
ORIENTATION = 0x0112
DAMAGED = "the data are damaged or of an unsupported kind; fetch the file again or re-encode it"

Image.init()  # so that every format is there to be named
Image.MAX_IMAGE_PIXELS = None  # PixelPolicy.most_pixels is asked instead, from the header
ImageFile.LOAD_TRUNCATED_IMAGES = False


@dataclass(frozen=True)
class Head:
    """What a picture's header says.

    Attributes:
        height, width: in pixels, before the picture is turned.
        by_dali: DALI shows it as it is meant.
        moving: more than one frame, in a format that FFmpeg decodes.
        hdr: PQ or HLG, which PyAV decodes in full depth.
    """

    height: int
    width: int
    by_dali: bool
    moving: bool
    hdr: bool


def inspect(path: Path, policy: PixelPolicy) -> Head | None:
    """None if the file is no picture that is known here.

    Raises:
        RejectedInput: a picture that cannot be decoded or is too large to.
    """
    try:
        with warnings.catch_warnings(action="ignore"), _open(path) as image:
            width, height = image.size
            most = policy.most_pixels // COSTS.get(image.format, 1)
            if width * height > most:
                remedy = (
                    f"more than {most} pixels ({image.format}, most_pixels={policy.most_pixels}); scale the "
                    "picture down or raise most_pixels"
                )
                raise RejectedInput(path, "size", f"{width}x{height}", remedy)
            hdr = _is_hdr(image, path)
            moving = image.format in MOVING and getattr(image, "n_frames", 1) > 1
            return Head(height, width, not moving and not hdr and _dali_shows_it(image, path), moving, hdr)
    except UnidentifiedImageError:
        return None
    except RejectedInput:
        raise
    except Exception as error:  # whatever a damaged header makes a format's reader stumble over
        raise _damaged(path, error) from None


def load(path: Path, policy: PixelPolicy, notes: Notes, least: int = 1 << 30) -> np.ndarray:
    """(H, W, 3) uint8 as a viewer shows it: upright, sRGB, composed over the background.

    least: pixels that both sides must keep. Pictures above LARGE are reduced by whole
    factors (means of blocks) as far as that allows.

    Raises:
        RejectedInput: damaged, or of a kind whose values have no fixed meaning.
    """
    try:
        with _open(path) as image:
            large = image.width * image.height > LARGE
            if large and image.format == "JPEG":
                image.draft(None, (least, least))
            image.load()
            if large and image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
                image = _reduced(image, least)
            return np.ascontiguousarray(_shown(image, path, policy, notes))
    except RejectedInput:
        raise
    except Exception as error:
        raise _damaged(path, error) from None


def check_whole(path: Path) -> None:
    """Reads a picture that DALI will decode as strictly as Pillow does: DALI's decoders
    fill with grey what a damaged file lacks.

    Raises:
        RejectedInput: damaged.
    """
    try:
        with _open(path) as image:
            if image.format == "PNG":
                image.verify()  # every chunk's checksum
                return
            if image.format in ("JPEG", "MPO"):
                image.draft(None, (1, 1))  # all of the file, but an eighth of the pixels
            image.load()
    except Exception as error:
        raise _damaged(path, error) from None


def _open(path: Path) -> Image.Image:
    return Image.open(path, formats=FORMATS)


def _damaged(path: Path, error: Exception) -> RejectedInput:
    text = " ".join(str(error).split()) or type(error).__name__
    return RejectedInput(path, "payload", f"does not decode ({text})", DAMAGED)


def _dali_shows_it(image: Image.Image, path: Path) -> bool:
    if image.format not in DALI_FORMATS or image.mode not in ("L", "RGB") or "transparency" in image.info:
        return False
    if os.path.getsize(path) > DALI_FILE_BYTES or image.width * image.height > LARGE:
        return False
    if image.format == "PNG" and not (_png_chunks(path) <= QUIET_CHUNKS and _png_depth(path) == 8):
        return False
    if image.format == "WEBP" and getattr(image, "is_animated", False):
        return False
    return image.getexif().get(ORIENTATION, 1) == 1 and not _foreign_profile(image)


def _png_chunks(path: Path) -> frozenset[bytes]:
    """Names of the chunks up to the pixels."""
    names = []
    with open(path, "rb") as file:
        file.seek(8)
        while len(header := file.read(8)) == 8 and len(names) < 1000:
            length, name = struct.unpack(">I4s", header)
            names.append(name)
            if name == b"IDAT":
                break
            file.seek(length + 4, os.SEEK_CUR)
    return frozenset(names)


def _png_depth(path: Path) -> int:
    with open(path, "rb") as file:
        return file.read(25)[-1]


def _is_hdr(image: Image.Image, path: Path) -> bool:
    """Code points of ITU-T H.273 in AVIF's nclx box or PNG's cICP chunk; primaries come
    first, then the transfer.
    """
    if image.format not in ("AVIF", "PNG"):
        return False
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if image.format == "PNG":
        place = head[: head.find(b"IDAT") if b"IDAT" in head else None].find(b"cICP")
        return place >= 0 and head[place + 5 : place + 6] in (bytes([PQ]), bytes([HLG]))
    place = head.find(b"colrnclx")
    return place >= 0 and head[place + 10 : place + 12] in (struct.pack(">H", PQ), struct.pack(">H", HLG))


def _shown(image: Image.Image, path: Path, policy: PixelPolicy, notes: Notes) -> np.ndarray:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or image.mode == "I":
        return _grey_of_16_bits(image, path, policy)
    if image.mode == "F":
        raise RejectedInput(
            path, "mode", "floating point", "it does not say which value is white; convert it to 8 or 16 bits"
        )
    transparent = "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBA", "RGBa")
    colours = _in_srgb(image, path, notes)
    if not transparent:
        return np.asarray(colours.convert("RGB"))
    pixels = np.array(image.convert("RGBA"))
    if colours is not image:
        pixels[..., :3] = np.asarray(colours.convert("RGB"))
    return compose(pixels, policy.background_rgb())


def _reduced(image: Image.Image, least: int) -> Image.Image:
    """Means of blocks of pixels; transparent pixels do not count, so that their colour stays hidden."""
    factor = min(image.size) // least
    if factor < 2:
        return image
    info, exif = image.info, image.getexif()
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in info:
        smaller = _reduced_by_bands(image, factor)
        info = {key: value for key, value in info.items() if key != "transparency"}
    else:
        smaller = (image.convert("RGB") if image.mode in ("1", "P") else image).reduce(factor)
    smaller.info = info
    smaller.getexif()[ORIENTATION] = exif.get(ORIENTATION, 1)
    return smaller


def _reduced_by_bands(image: Image.Image, factor: int) -> Image.Image:
    """RGBA, band by band: weighted by transparency, a whole picture would be held three times."""
    height = 64 * factor
    bands = (
        image.crop((0, top, image.width, min(top + height, image.height)))
        .convert("RGBA")
        .convert("RGBa")
        .reduce(factor)
        for top in range(0, image.height, height)
    )
    whole = Image.new("RGBA", (-(-image.width // factor), -(-image.height // factor)))
    for number, band in enumerate(bands):
        whole.paste(band.convert("RGBA"), (0, 64 * number))
    return whole


def _grey_of_16_bits(image: Image.Image, path: Path, policy: PixelPolicy) -> np.ndarray:
    grey = np.asarray(image)
    if image.mode == "I" and (grey.min() < 0 or grey.max() > 65535):
        raise RejectedInput(
            path,
            "mode",
            "32-bit integers",
            "it does not say which value is white; convert it to 8 or 16 bits",
        )
    eight = np.empty(grey.shape, np.uint8)
    for i in range(0, len(grey), 256):
        eight[i : i + 256] = (grey[i : i + 256].astype(np.uint32) * 255 + 32767) // 65535
    rgb = np.broadcast_to(eight[..., None], (*grey.shape, 3))
    if isinstance(image.info.get("transparency"), int):
        alpha = np.where(grey == image.info["transparency"], 0, 255).astype(np.uint8)
        rgb = compose(np.concatenate([rgb, alpha[..., None]], 2), policy.background_rgb())
    return rgb


def _profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    data = image.info.get("icc_profile")
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(data)) if data else None
    except (OSError, ImageCms.PyCMSError):
        return None  # viewers ignore broken profiles too


def _foreign_profile(image: Image.Image) -> bool:
    """Whether an embedded profile describes other colours than sRGB's. A grey curve
    counts: sRGB's own grey is written without a profile.
    """
    profile = _profile(image)
    return profile is not None and not (
        image.mode != "CMYK" and "srgb" in (profile.profile.profile_description or "").lower()
    )


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _in_srgb(image: Image.Image, path: Path, notes: Notes) -> Image.Image:
    """The picture without its transparency in sRGB, if it carries another profile; else itself."""
    if not _foreign_profile(image) and image.mode != "LAB":
        return image
    profile = _profile(image)
    opaque = (
        image
        if image.mode in ("L", "RGB", "CMYK", "LAB")
        else image.convert("L" if image.mode in ("LA", "La", "1") else "RGB")
    )
    try:
        source = ImageCms.createProfile("LAB") if image.mode == "LAB" else profile
        converted = ImageCms.profileToProfile(
            opaque, source, _srgb(), ImageCms.Intent.RELATIVE_COLORIMETRIC, outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        notes.add(path, f"colour profile not applied ({' '.join(str(error).split())})")
        return image
    assert converted is not None  # as it is where a picture is converted in place
    notes.add(path, "colour profile, converted to sRGB")
    return converted
