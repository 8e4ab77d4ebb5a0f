"""Counter-based random numbers: any slice of any sample's noise is a pure function of its key.

Philox 4x32 with 10 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The key is 64 bits derived from
(seed, iteration, phase, purpose); the counter is (block of four numbers inside the sample, sample id). So a number depends on neither
rank, order, batch nor mesh.
"""

import hashlib
import math

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def derive_key(*parts: int | str) -> int:
    """64-bit Philox key of a purpose, e.g. derive_key(seed, iteration, "g", "noise")."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _philox(key: int, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Four uint32 words (held in int64) per counter; `low`, `high` are the counter's 64-bit halves, below 2**63."""
    c0, c1, c2, c3 = low & _MASK, (low >> 32) & _MASK, high & _MASK, (high >> 32) & _MASK
    k0, k1 = key & _MASK, key >> 32
    for _ in range(10):
        # 32 x 32 -> 64 bit products wrap in int64, but the two halves read from them are right: >> is made logical by the mask.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _words(key: int, sample_ids: torch.Tensor, count: int, start: int) -> tuple[torch.Tensor, ...]:
    first = start // 4
    blocks = torch.arange(first, (start + count + 3) // 4, device=sample_ids.device, dtype=torch.int64)
    low = blocks.expand(len(sample_ids), -1)
    high = sample_ids.to(torch.int64)[:, None].expand_as(low)
    return _philox(key, low, high)


def keyed_uniform(key: int, sample_ids: torch.Tensor, count: int, start: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Uniform numbers in (0, 1): entries start .. start + count of each sample's stream, (n, count).

    They have 23 random bits, so that no rounding to fp32 reaches 0 or 1.
    """
    words = torch.stack(_words(key, sample_ids, count, start), dim=-1).flatten(1)
    offset = start % 4
    return (((words[:, offset : offset + count] >> 9).to(torch.float64) + 0.5) * 2.0**-23).to(dtype)


def keyed_normal(key: int, sample_ids: torch.Tensor, count: int, start: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers (Box-Muller, computed in fp32): entries start .. start + count of each sample's stream, (n, count).

    Args:
        key: from `derive_key`.
        sample_ids: (n,) int64, non-negative; equal ids give equal rows.
    """
    w0, w1, w2, w3 = _words(key, sample_ids, count, start)
    radius = lambda w: torch.sqrt(-2.0 * torch.log(((w >> 9).to(torch.float32) + 0.5) * 2.0**-23))  # noqa: E731
    angle = lambda w: (w >> 8).to(torch.float32) * (2.0 * math.pi * 2.0**-24)  # noqa: E731
    r0, r1, a0, a1 = radius(w0), radius(w2), angle(w1), angle(w3)
    normal = torch.stack((r0 * torch.cos(a0), r0 * torch.sin(a0), r1 * torch.cos(a1), r1 * torch.sin(a1)), dim=-1).flatten(1)
    offset = start % 4
    return normal[:, offset : offset + count].to(dtype)
