"""The size that key frames of VP8, VP9 and Motion JPEG say they have: DALI decodes a file
at its first size, without a word where it changes.
"""


def coded_size(codec: str, data: bytes | memoryview) -> tuple[int, int] | None:
    """(width, height) in the first bytes of a key frame, or None where this codec or
    frame is not understood.
    """
    readers = {"vp8": _vp8, "vp9": _vp9, "mjpeg": _jpeg}
    try:
        return readers[codec](bytes(data)) if codec in readers else None
    except IndexError:
        return None


def _vp8(data: bytes) -> tuple[int, int] | None:
    """RFC 6386, 9.1: three bytes of frame tag, a start code, then 14 bits each of width and height."""
    if data[3:6] != b"\x9d\x01\x2a":
        return None
    width, height = (int.from_bytes(data[i : i + 2], "little") & 0x3FFF for i in (6, 8))
    return width, height


def _vp9(data: bytes) -> tuple[int, int] | None:
    """VP9 bitstream specification, 6.2 (uncompressed_header) and 6.2.2 (color_config)."""
    place = 0

    def read(bits: int) -> int:
        nonlocal place
        value = 0
        for _ in range(bits):
            value = value << 1 | (data[place >> 3] >> (7 - (place & 7)) & 1)
            place += 1
        return value

    if read(2) != 2:
        return None
    profile = read(1) | read(1) << 1
    if profile == 3:
        read(1)
    shown_again, inter = read(1), read(1)
    read(2)  # show_frame, error_resilient_mode
    if shown_again or inter or read(24) != 0x498342:
        return None
    if profile >= 2:
        read(1)  # 12 bits
    rgb = read(3) == 7
    if not rgb:
        read(1)  # full range
    if profile in (1, 3):
        read(1 if rgb else 3)  # subsampling
    return read(16) + 1, read(16) + 1


def _jpeg(data: bytes) -> tuple[int, int] | None:
    """ITU-T T.81, B.1: segments up to the frame header, which has height and width behind
    its length and precision.
    """
    place = 2
    while data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[place + 7 : place + 9]), int.from_bytes(data[place + 5 : place + 7])
        place += 2 + length
    return None
