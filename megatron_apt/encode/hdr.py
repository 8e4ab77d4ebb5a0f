"""High dynamic range to standard: PQ and HLG (ITU-R BT.2100) as BT.709 shows them.

Signal -> light in cd/m2 -> BT.709's primaries -> roll-off of highlights -> signal of a
BT.1886 display. Diffuse white is 203 cd/m2 (ITU-R BT.2408). What lies below KNEE of it
comes back as it was graded; what is brighter is compressed into the rest, so that nothing
clips.
"""

from functools import cache

import numpy as np

PQ, HLG = 16, 18  # transfer characteristics of ITU-T H.273, as FFmpeg numbers them
WHITE = 203.0  # cd/m2
PEAK = 1000.0  # cd/m2 of the display that HLG is defined on
KNEE = 0.8  # of diffuse white
GAMMA = 2.4  # ITU-R BT.1886
ROWS = 64  # converted at once: a whole frame in float32 would take eight times its bytes

# Linear light to BT.709's primaries: from BT.2020's (ITU-R BT.2087), which HDR has unless
# it says otherwise, and from P3's with white D65.
FROM_2020 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
FROM_P3 = np.array([[1.2249, -0.2249, 0.0], [-0.0420, 1.0420, 0.0], [-0.0197, -0.0786, 1.0983]], np.float32)
# By ITU-T H.273's number of the primaries
TO_709 = {1: np.eye(3, dtype=np.float32), 11: FROM_P3, 12: FROM_P3}
LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)


def pq_light(signal: np.ndarray) -> np.ndarray:
    """cd/m2 of a PQ signal in [0, 1] (SMPTE ST 2084, equation 4.1)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = signal ** (1 / m2)
    return 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def hlg_scene(signal: np.ndarray) -> np.ndarray:
    """Scene light in [0, 1] of an HLG signal in [0, 1] (BT.2100, table 5: inverse OETF)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def roll_off(light: np.ndarray) -> np.ndarray:
    """Light relative to diffuse white, of any brightness, to [0, 1): the identity up to
    KNEE, then smooth and ever rising.
    """
    above = np.maximum(light - KNEE, 0) / (1 - KNEE)
    return np.where(light <= KNEE, light, KNEE + (1 - KNEE) * above / (1 + above))


@cache
def _light_of_16_bits(transfer: int) -> np.ndarray:
    signal = np.arange(65536) / 65535
    return (pq_light(signal) / WHITE if transfer == PQ else hlg_scene(signal)).astype(np.float32)


def to_sdr(pixels: np.ndarray, transfer: int, primaries: int = 9) -> np.ndarray:
    """(H, W, 3) uint16 R'G'B' of PQ or HLG, full range, to uint8 R'G'B' of BT.709 video."""
    matrix = TO_709.get(primaries, FROM_2020).T
    return np.concatenate(
        [_rows_to_sdr(pixels[i : i + ROWS], transfer, matrix) for i in range(0, len(pixels), ROWS)]
    )


def _rows_to_sdr(pixels: np.ndarray, transfer: int, matrix: np.ndarray) -> np.ndarray:
    light = _light_of_16_bits(transfer)[pixels]
    if transfer == HLG:  # BT.2100's OOTF: the display raises luminance to 1.2
        luma = np.maximum(light @ LUMA_2020, 1e-9)[..., None]
        light = light * luma**0.2 * (PEAK / WHITE)
    light = np.maximum(light @ matrix, 0)
    brightest = np.maximum(light.max(-1, keepdims=True), 1e-9)
    light *= roll_off(brightest) / brightest  # by the brightest channel, which keeps hues
    return (255 * light ** (1 / GAMMA) + 0.5).astype(np.uint8)
