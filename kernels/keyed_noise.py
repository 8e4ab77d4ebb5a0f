"""Counter-based random numbers: any slice of any sample's noise follows from its key.

Philox 4x32 with 10 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3"). The key is 64 bits derived from (seed, iteration, phase, purpose); the counter is
(block of four numbers inside the sample, sample id). So a number depends on neither rank,
order, batch nor mesh.

A sample's noise is its stream in latent order: number ((c F + f) H + y) W + x belongs to
latent (c, f, y, x). Kernels draw it in one of two orders:
    stream order   each program makes whole blocks of four numbers; e bytes written a number
    token order    exactly the tokens given, (T, C pf ph pw) as the model takes them, and on
                   request a x + b n in the same pass: 2 e bytes a number

Neighbours in a token are not neighbours in the stream, so in token order every number
makes its own block and drops three words. That is about 160 instructions a number: for
one video, 46,800 tokens of 64 numbers, an estimated 20 us on an H200. The reference in
torch is some 200 operations over whole latents, each a pass over memory. The words are
those of the reference; logarithm, sine and cosine differ from torch's by rounding, normal
numbers thus by about 1e-6.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_apt.kernels.launch import DTYPES, jit, launch, tl, use_kernels

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_BLOCKS = 128  # of four numbers, of one program
_NUMBERS = 512  # of one program in token order


def derive_key(*parts: int | str) -> int:
    """64-bit Philox key of a purpose, e.g. derive_key(seed, iteration, "g", "noise")."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _philox(key: int, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
    """Four uint32 words (held in int64) per counter; `low`, `high` are the counter's
    64-bit halves, below 2**63.
    """
    c0, c1, c2, c3 = low & _MASK, (low >> 32) & _MASK, high & _MASK, (high >> 32) & _MASK
    k0, k1 = key & _MASK, key >> 32
    for _ in range(10):
        # 32 x 32 -> 64 bit products wrap in int64, but the two halves read from them are
        # right: >> is made logical by the mask.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _words(key: int, sample_ids: Tensor, count: int, start: int) -> tuple[Tensor, ...]:
    first = start // 4
    blocks = torch.arange(first, (start + count + 3) // 4, device=sample_ids.device, dtype=torch.int64)
    low = blocks.expand(len(sample_ids), -1)
    high = sample_ids.to(torch.int64)[:, None].expand_as(low)
    return _philox(key, low, high)


def keyed_uniform_reference(
    key: int, sample_ids: Tensor, count: int, start: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The definition."""
    words = torch.stack(_words(key, sample_ids, count, start), dim=-1).flatten(1)
    offset = start % 4
    return (((words[:, offset : offset + count] >> 9).to(torch.float64) + 0.5) * 2.0**-23).to(dtype)


def keyed_normal_reference(
    key: int, sample_ids: Tensor, count: int, start: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The definition."""
    w0, w1, w2, w3 = _words(key, sample_ids, count, start)
    radius = lambda w: torch.sqrt(-2.0 * torch.log(((w >> 9).to(torch.float32) + 0.5) * 2.0**-23))  # noqa: E731
    angle = lambda w: (w >> 8).to(torch.float32) * (2.0 * math.pi * 2.0**-24)  # noqa: E731
    r0, r1, a0, a1 = radius(w0), radius(w2), angle(w1), angle(w3)
    normal = torch.stack(
        (r0 * torch.cos(a0), r0 * torch.sin(a0), r1 * torch.cos(a1), r1 * torch.sin(a1)), dim=-1
    ).flatten(1)
    offset = start % 4
    return normal[:, offset : offset + count].to(dtype)


@jit
def _block_words(key, block, sample):
    """Four uint32 words of each block; `block` and `sample` are int64."""
    return tl.philox(
        key,
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32),
        sample.to(tl.uint32),
        (sample >> 32).to(tl.uint32),
    )


@jit
def _unit(word):
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23


@jit
def _radius(word):
    return tl.sqrt(-2.0 * tl.log(_unit(word)))


@jit
def _angle(word):
    return (word >> 8).to(tl.float32) * 3.7450702829239286e-07  # 2 pi 2^-24


@jit
def _cos_sin(angle):
    """Of angles up to 2 pi: the nearest quarter turn taken away, in two parts of which
    the first is exact, and Taylor's series of the rest, to 1e-7.

    tl.cos and tl.sin also know how to reduce huge angles, for which every thread has a
    table in local memory.
    """
    quarter = (angle * 0.6366197723675814 + 0.5).to(tl.int32)
    rest = (angle - quarter.to(tl.float32) * 1.5703125) - quarter.to(tl.float32) * 4.838267948966192e-04
    square = rest * rest
    sin = rest + rest * square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square / 362880)))
    cos = 1.0 + square * (-0.5 + square * (1 / 24 + square * (-1 / 720 + square / 40320)))
    odd = (quarter & 1) != 0
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(((quarter + 1) & 2) != 0, -cos, cos), tl.where((quarter & 2) != 0, -sin, sin)


@jit(do_not_specialize=["key", "parts"])
def _stream(out_at, ids_at, key, start, count, parts, UNIFORM: tl.constexpr, BLOCKS: tl.constexpr):
    row = tl.program_id(0) // parts
    block = start // 4 + (tl.program_id(0) % parts).to(tl.int64) * BLOCKS
    w0, w1, w2, w3 = _block_words(key, block + tl.arange(0, BLOCKS), tl.load(ids_at + row))
    if UNIFORM:
        n0, n1, n2, n3 = _unit(w0), _unit(w1), _unit(w2), _unit(w3)
    else:
        r0, r1 = _radius(w0), _radius(w2)
        c0, s0 = _cos_sin(_angle(w1))
        c1, s1 = _cos_sin(_angle(w3))
        n0, n1, n2, n3 = r0 * c0, r0 * s0, r1 * c1, r1 * s1
    numbers = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
    place = 4 * block - start + tl.arange(0, 4 * BLOCKS)
    tl.store(
        out_at + row.to(tl.int64) * count + place,
        numbers.to(out_at.dtype.element_ty),
        mask=(place >= 0) & (place < count),
    )


def _drawn(key: int, sample_ids: Tensor, count: int, start: int, dtype: torch.dtype, uniform: bool) -> Tensor:
    out = torch.empty(len(sample_ids), count, dtype=dtype, device=sample_ids.device)
    parts = -(-((start + count + 3) // 4 - start // 4) // _BLOCKS)
    ids = sample_ids.to(torch.int64).contiguous()
    launch(
        _stream,
        (len(ids) * parts,),
        out,
        ids,
        _signed(key),
        start,
        count,
        parts,
        UNIFORM=uniform,
        BLOCKS=_BLOCKS,
    )
    return out


def _signed(key: int) -> int:
    """The key's 64 bits as a signed number, so that all keys are of one type."""
    return key - 2**64 if key >= 2**63 else key


def keyed_uniform(
    key: int, sample_ids: Tensor, count: int, start: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform numbers in (0, 1) of each sample's stream: start .. start + count, (n, count).

    They have 23 random bits, so that no rounding to fp32 reaches 0 or 1.
    """
    if dtype not in DTYPES or not use_kernels(sample_ids):
        return keyed_uniform_reference(key, sample_ids, count, start, dtype)
    return _drawn(key, sample_ids, count, start, dtype, uniform=True)


def keyed_normal(
    key: int, sample_ids: Tensor, count: int, start: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal numbers (Box-Muller, computed in fp32): entries start .. start +
    count of each sample's stream, (n, count).

    Args:
        key: from `derive_key`.
        sample_ids: (n,) int64, non-negative; equal ids give equal rows.
    """
    if dtype not in DTYPES or not use_kernels(sample_ids):
        return keyed_normal_reference(key, sample_ids, count, start, dtype)
    return _drawn(key, sample_ids, count, start, dtype, uniform=False)


# --- token order


@dataclass(frozen=True, eq=False)
class Tokens:
    """Where each token lies in its sample's latents."""

    positions: Tensor  # (T, 3) int64: frame, row, column on the grid of patches
    sample: Tensor  # (T,) int64
    sizes: Tensor  # (n, 3) int64: frames, rows, columns of each sample's latents
    patch: tuple[int, int, int]


@jit(do_not_specialize=["key"])
def _tokens(
    out_at,
    x_at,
    a_at,
    b_at,
    positions,
    samples,
    sizes,
    ids_at,
    key,
    tokens,
    width,
    PF: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, TILE)
    inside = row < tokens
    mask = inside[:, None] & (column < width)[None, :]
    sample = tl.load(samples + row, mask=inside, other=0)
    size, position = sizes + 3 * sample, positions + 3 * row.to(tl.int64)
    rows, columns = tl.load(size + 1, mask=inside, other=1), tl.load(size + 2, mask=inside, other=1)
    plane = tl.load(size, mask=inside, other=1) * rows * columns
    frame = PF * tl.load(position, mask=inside, other=0)
    y = PH * tl.load(position + 1, mask=inside, other=0)
    x = PW * tl.load(position + 2, mask=inside, other=0)
    first = (frame * rows + y) * columns + x
    channel, df, dy, dx = column // (PF * PH * PW), column // (PH * PW) % PF, column // PW % PH, column % PW
    index = (
        first[:, None]
        + channel[None, :] * plane[:, None]
        + (df[None, :] * rows[:, None] + dy[None, :]) * columns[:, None]
        + dx[None, :]
    )
    w0, w1, w2, w3 = _block_words(key, index >> 2, tl.load(ids_at + sample, mask=inside, other=0)[:, None])
    upper = (index & 2) != 0
    cos, sin = _cos_sin(_angle(tl.where(upper, w3, w1)))
    noise = _radius(tl.where(upper, w2, w0)) * tl.where((index & 1) != 0, sin, cos)
    noise = noise.to(out_at.dtype.element_ty)
    place = row[:, None].to(tl.int64) * width + column[None, :]
    if x_at is not None:
        a, b = tl.load(a_at + sample, mask=inside, other=0.0), tl.load(b_at + sample, mask=inside, other=0.0)
        noise = a[:, None] * tl.load(x_at + place, mask=mask, other=0.0).to(tl.float32) + b[
            :, None
        ] * noise.to(tl.float32)
    tl.store(out_at + place, noise.to(out_at.dtype.element_ty), mask=mask)


def _token_order(
    key: int,
    sample_ids: Tensor,
    tokens: Tokens,
    out: Tensor,
    x: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
) -> Tensor:
    width, (pf, ph, pw) = out.shape[1], tokens.patch
    tile = 1 << (width - 1).bit_length()
    rows = max(_NUMBERS // tile, 1)
    places = (
        tokens.positions.contiguous(),
        tokens.sample,
        tokens.sizes,
        sample_ids.to(torch.int64).contiguous(),
    )
    sizes = {"PF": pf, "PH": ph, "PW": pw, "ROWS": rows, "TILE": tile}
    launch(_tokens, (-(-len(out) // rows),), out, x, a, b, *places, _signed(key), len(out), width, **sizes)
    return out


def token_noise(key: int, sample_ids: Tensor, tokens: Tokens, like: Tensor) -> Tensor:
    """keyed_normal's numbers of these tokens, in the order of `patchify`, by a kernel.

    The reference, which draws whole latents and selects tokens, is `Microbatch.noise`.

    Args:
        sample_ids: (n,) of each sample.
        like: (T, C pf ph pw), gives shape and dtype.
    """
    return _token_order(
        key,
        sample_ids,
        tokens,
        torch.empty_like(like, memory_format=torch.contiguous_format),
        None,
        None,
        None,
    )


def token_mix(key: int, sample_ids: Tensor, tokens: Tokens, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a x + b n with the numbers n of `token_noise` and (n,) factors of each sample; fp32
    arithmetic, rounded once; no gradient.
    """
    x, a, b = x.contiguous(), a.float().contiguous(), b.float().contiguous()
    return _token_order(key, sample_ids, tokens, torch.empty_like(x), x, a, b)
