"""From decoded frames of any colour coding to 8-bit RGB, as FFmpeg's own tools do.

Matrix, range, chroma subsampling and depth are the frame's (which the decoder took from
the bitstream, or from the container where that is silent); what is tagged nowhere is
BT.601 in limited range, FFmpeg's rule. Primaries of SDR video are left as they are
(FFmpeg's rule too); PQ and HLG are tone-mapped.
"""

from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.video.reformatter import Colorspace

from megatron_apt.encode.hdr import HLG, PQ, to_sdr
from megatron_apt.encode.notes import Notes
from megatron_apt.encode.policy import PixelPolicy
from megatron_apt.encode.rejected import RejectedInput

# Matrix coefficients of ITU-T H.273: swscale's name of each it converts. Those that say nothing are BT.601.
MATRICES = {1: Colorspace.ITU709, 4: Colorspace.FCC, 7: Colorspace.SMPTE240M, 9: Colorspace.BT2020}
UNCONVERTED = {
    8: "YCgCo",
    10: "BT.2020 constant luminance",
    11: "SMPTE ST 2085",
    14: "ICtCp",
    15: "IPT-C2",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}
DALI_MATRICES = (2, 3, 5, 6)  # measured: DALI's video decoder knows BT.601 alone
HDR_NAMES = {PQ: "PQ", HLG: "HLG"}


def dali_converts_it(frame: av.VideoFrame) -> bool:
    """Whether DALI's own conversion is right for the frame: it honours range and depth,
    but no other matrix, no transparency and no HDR.
    """
    matrix = frame.colorspace in DALI_MATRICES or (frame.colorspace == 0 and frame.format.is_rgb)
    return (
        matrix
        and frame.color_trc not in HDR_NAMES
        and not has_alpha(frame)
        and not is_dolby_vision_only(frame)
    )


def has_alpha(frame: av.VideoFrame) -> bool:
    return frame.format.name.startswith(
        ("yuva", "rgba", "bgra", "argb", "abgr", "gbrap", "ya8", "ya16", "yaf", "pal8", "ayuv", "vuya")
    )


def is_dolby_vision_only(frame: av.VideoFrame) -> bool:
    """Profile 5: colours that only a Dolby Vision decoder can read. Other profiles have a
    base layer that says what it is.
    """
    return frame.color_trc in (0, 2) and any(name.startswith("DOVI") for name, _ in side_data(frame))


def side_data(frame: av.VideoFrame) -> list[tuple[str, bytes]]:
    """What comes with a frame beside its pixels: name and bytes of each."""
    return [(data.type.name, bytes(data)) for data in cast(Any, frame.side_data)]


def refuse_dolby_vision(frame: av.VideoFrame, path: Path) -> None:
    """
    Raises:
        RejectedInput: colours that only a Dolby Vision decoder can read.
    """
    if is_dolby_vision_only(frame):
        raise RejectedInput(
            path,
            "colour",
            "Dolby Vision profile 5",
            "its colours need Dolby's decoder; export the video as HDR10 or SDR",
        )


def to_rgb(frame: av.VideoFrame, path: Path, policy: PixelPolicy, notes: Notes) -> np.ndarray:
    """(H, W, 3) uint8, neither turned nor scaled.

    Raises:
        RejectedInput: colours that cannot be converted, or that the policy does not want.
    """
    if frame.colorspace in UNCONVERTED:
        raise RejectedInput(
            path,
            "colour",
            UNCONVERTED[frame.colorspace],
            "this matrix cannot be converted; re-encode the file with BT.709's",
        )
    hdr = HDR_NAMES.get(frame.color_trc)
    if hdr and policy.hdr == "reject":
        raise RejectedInput(
            path, "hdr", hdr, "HDR, and hdr='reject'; use hdr='tonemap', or convert it to SDR"
        )
    if hdr and policy.hdr == "tonemap":
        notes.add(path, f"HDR ({hdr}), tone-mapped to SDR")
        return to_sdr(_converted(frame, "rgb48le"), frame.color_trc, frame.color_primaries)
    if hdr:
        notes.add(path, f"HDR ({hdr}), taken as it is: its colours are washed out")
    if has_alpha(frame):
        return compose(_converted(frame, "rgba"), policy.background_rgb())
    return _converted(frame, "rgb24")


def _converted(frame: av.VideoFrame, pix_fmt: str) -> np.ndarray:
    matrix = None if frame.format.is_rgb else MATRICES.get(frame.colorspace, Colorspace.ITU601)
    return frame.to_ndarray(format=pix_fmt, interpolation="BICUBIC", src_colorspace=matrix, threads=1)


def compose(pixels: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """(H, W, 4) uint8 with straight alpha over one colour: (H, W, 3) uint8. Rows by rows,
    because products need 16 bits.
    """
    result = np.empty((*pixels.shape[:2], 3), np.uint8)
    behind = np.array(background, np.uint16)
    for i in range(0, len(pixels), 256):
        rows = pixels[i : i + 256].astype(np.uint16)
        alpha = rows[..., 3:]
        result[i : i + 256] = (rows[..., :3] * alpha + behind * (255 - alpha) + 127) // 255
    return result
