"""What to do with pictures that can become samples in more than one way."""

from dataclasses import dataclass
from typing import Literal

from PIL import ImageColor


@dataclass(frozen=True)
class PixelPolicy:
    """How odd pictures become samples.

    Attributes:
        hdr: PQ and HLG are tone-mapped to BT.709, rejected, or taken as they are with a
            warning.
        interlaced: fields are deinterlaced, rejected, or left combed with a warning.
        background: what lies under transparent pixels, as a name or #rrggbb.
        most_pixels: pictures larger than this are rejected before they are decoded; so
            are videos above a quarter of it, of which decoders hold several frames at a
            time.
    """

    hdr: Literal["tonemap", "reject", "warn"] = "tonemap"
    interlaced: Literal["deinterlace", "reject", "warn"] = "deinterlace"
    background: str = "white"
    most_pixels: int = 1 << 27

    def __post_init__(self):
        for field, choices in (
            ("hdr", ("tonemap", "reject", "warn")),
            ("interlaced", ("deinterlace", "reject", "warn")),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field}={getattr(self, field)!r}: use {', '.join(map(repr, choices))}")
        if self.most_pixels < 1:
            raise ValueError(f"most_pixels={self.most_pixels}: must be at least 1")
        self.background_rgb()

    def background_rgb(self) -> tuple[int, int, int]:
        """
        Raises:
            ValueError: not a colour.
        """
        try:
            return ImageColor.getrgb(self.background)[:3]
        except (ValueError, AttributeError):
            raise ValueError(
                f"background={self.background!r} is no colour; use a name such as 'white', or '#rrggbb'"
            ) from None

    @property
    def most_frame_pixels(self) -> int:
        return self.most_pixels // 4
