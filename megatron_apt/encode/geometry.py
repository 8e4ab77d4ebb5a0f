"""How a decoded picture is turned, mirrored and stretched until it looks as players show
it: display matrices and pixel aspect ratios.
"""

import math
import struct
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

TOLERANCE = math.radians(1)  # players turn by quarters where the matrix is this near to one
ASPECTS = Fraction(1, 16), Fraction(16)  # pixels beyond are a damaged header's


@dataclass(frozen=True)
class Orientation:
    """One of the eight ways to lay a rectangle on itself: transposed first (rows become
    columns), then its rows and columns reversed.
    """

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """A view of the pixels (H, W, C) as shown."""
        if self.transpose:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]

    def size(self, height: float, width: float) -> tuple[float, float]:
        return (width, height) if self.transpose else (height, width)


UPRIGHT = Orientation()


def orientation(matrix: bytes) -> Orientation:
    """Orientation of a display matrix: nine int32 of FFmpeg's side data, the first two
    columns in 16.16 (ISO 14496-12, 6.2.2).

    A point (x, y) of the decoded picture is shown at (a x + c y, b x + d y). How much the
    matrix scales is left to the pixel aspect ratio, as FFmpeg does.

    Raises:
        ValueError: a matrix that turns by no multiple of 90 degrees, or shears; its text
            says by how much.
    """
    a, b, _, c, d, *_ = (value / 65536 for value in struct.unpack("=9i", matrix[:36]))
    columns = math.hypot(a, b), math.hypot(c, d)
    if 0 in columns:
        return UPRIGHT  # no picture could be shown with it, so it is no statement about one
    a, b, c, d = a / columns[0], b / columns[0], c / columns[1], d / columns[1]
    if max(abs(b), abs(c)) <= math.sin(TOLERANCE):
        return Orientation(flip_rows=d < 0, flip_columns=a < 0)
    if max(abs(a), abs(d)) <= math.sin(TOLERANCE):
        return Orientation(transpose=True, flip_rows=b < 0, flip_columns=c < 0)
    raise ValueError(
        f"{math.degrees(math.atan2(b, a)):.0f} degrees" if abs(a * c + b * d) < 0.02 else "sheared"
    )


def shown_size(height: int, width: int, aspect: Fraction | None) -> tuple[float, float]:
    """(height, width) of the picture in square pixels, before it is turned. aspect: width
    of a pixel over its height; None or 0: square.

    Raises:
        ValueError: an aspect ratio that no camera has.
    """
    if not aspect or aspect == 1:
        return height, width
    if not ASPECTS[0] <= aspect <= ASPECTS[1]:
        raise ValueError(f"{aspect.numerator}:{aspect.denominator}")
    return height, float(width * aspect)
