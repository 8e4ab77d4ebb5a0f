"""Damage of bytes, of JSON and of fields beside a marker; seeded, each with a description."""

import json
import random
import struct
from collections.abc import Sequence
from typing import Any

_EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x10000000)

# Texts that stand for themselves in JSON: what no json.dumps would write.
_RAW = {
    "NaN": "NaN",
    "-Infinity": "-Infinity",
    "1e400": "1e400",
    "a number of 5000 digits": "1" * 5000,
    "10**30": str(10**30),
    "a lone surrogate": '"\\ud800"',
    "100,000 nested lists": "[" * 100_000 + "]" * 100_000,
    "900 nested lists": "[" * 900 + "]" * 900,
}
_VALUES = (
    None,
    True,
    False,
    "",
    "x",
    "é\u2028",
    "../../x",
    "/dev/zero",
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    10**9,
    10**18,
    1.5,
    -0.0,
    1e308,
    1e-320,
    [],
    {},
    [1],
)
_VALUES += ({"a": 1}, [[]], [None], ["x"], "A" * 300_000, "\x00", [0] * 10_000)


def bytes_damage(rng: random.Random, data: bytes, other: bytes = b"") -> tuple[bytes, str]:
    """Damaged bytes and what was done; `other` is material to splice in."""
    kinds = (_flip, _overwrite, _cut, _zeros, _insert, _delete, _repeat, _field, _field, _junk_after, _splice)
    return rng.choice(kinds)(rng, data, other or data[::-1])


def _flip(rng, data, other):
    changed, count = bytearray(data), rng.choice((1, 1, 4, 32))
    places = [rng.randrange(len(data)) for _ in range(count)] if data else []
    for place in places:
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed), f"{count} bits flipped, the first at {places[:1]}"


def _overwrite(rng, data, other):
    start, size = _span(rng, data)
    return data[:start] + rng.randbytes(size) + data[start + size :], f"{size} random bytes at {start}"


def _cut(rng, data, other):
    end = rng.choice((0, 1, len(data) // 2, len(data) - 1, rng.randrange(len(data) + 1)))
    return data[:end], f"cut to {end} of {len(data)} bytes"


def _zeros(rng, data, other):
    start, size = _span(rng, data)
    return data[:start] + bytes(size) + data[start + size :], f"{size} zeros at {start}"


def _insert(rng, data, other):
    start, size = rng.randrange(len(data) + 1), rng.choice((1, 3, 64, 5000))
    return data[:start] + rng.randbytes(size) + data[start:], f"{size} bytes put in at {start}"


def _delete(rng, data, other):
    start, size = _span(rng, data)
    return data[:start] + data[start + size :], f"{size} bytes taken out at {start}"


def _repeat(rng, data, other):
    start, size = _span(rng, data)
    return data[: start + size] * 1 + data[start : start + size] * 20 + data[
        start + size :
    ], f"{size} bytes at {start} repeated"


def _field(rng, data, other):
    width, order = rng.choice((2, 4, 4, 8)), rng.choice("<>")
    start = rng.randrange(max(1, min(len(data), rng.choice((64, 512, 4096, len(data) + 1)))))
    value = rng.choice(_EXTREMES) & (2 ** (8 * width) - 1)
    packed = struct.pack(order + {2: "H", 4: "I", 8: "Q"}[width], value)
    return data[:start] + packed + data[start + width :], f"{value:#x} as {width} bytes ({order}) at {start}"


def _junk_after(rng, data, other):
    return data + rng.randbytes(rng.choice((1, 512, 100_000))), "junk behind the end"


def _splice(rng, data, other):
    middle = rng.randrange(len(data) + 1)
    return data[:middle] + other[min(middle, len(other)) :], f"spliced with another file at {middle}"


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    size = min(len(data), rng.choice((1, 4, 16, 256, 2048)))
    return rng.randrange(max(1, len(data) - size + 1)), size


def beside_marker(
    rng: random.Random, data: bytes, markers: Sequence[bytes], reach: int = 48
) -> tuple[bytes, str]:
    """An extreme number a few bytes from one of the markers (names of boxes or chunks)."""
    found = [(marker, place) for marker in markers if (place := data.find(marker)) >= 0]
    if not found:
        return bytes_damage(rng, data)
    marker, place = rng.choice(found)
    start = max(0, place + rng.randrange(-4, reach))
    value = rng.choice(_EXTREMES)
    return data[:start] + struct.pack(rng.choice("<>") + "I", value) + data[
        start + 4 :
    ], f"{value:#x} at {start - place} from {marker!r}"


def json_damage(rng: random.Random, value: object, least: int = 0) -> tuple[bytes, str, str]:
    """(text, description, name of the field): JSON with one thing wrong in its structure.

    Args:
        least: depth below which fields are changed (0: also the whole value).
    """
    places = [path for path in _places(value) if len(path) >= least]
    places = [path for path in places if (path and len(path) <= 2) or rng.random() < 0.3] or places
    path = rng.choice(places)
    name = next((str(key) for key in reversed(path) if isinstance(key, str)), "")
    shown = ".".join(map(str, path)) or "the whole"
    how = rng.random()
    if how < 0.15 and path:
        return json.dumps(_without(value, path)).encode(), f"{shown} missing", name
    if how < 0.20 and path and isinstance(path[-1], str):
        text = json.dumps(_replaced(value, path, ""))
        key = json.dumps(path[-1])
        return text.replace(f'{key}: ""', f"{key}: 1, {key}: null", 1).encode(), f"{shown} twice", name
    if how < 0.25:
        text, what = bytes_damage(rng, json.dumps(value).encode())
        return text, what, name
    if how < 0.30:
        return _text_damage(rng, json.dumps(value), name)
    if how < 0.55:
        described, raw = rng.choice(list(_RAW.items()))
        return (
            json.dumps(_replaced(value, path, "")).replace('""', raw, 1).encode(),
            f"{shown} is {described}",
            name,
        )
    new = rng.choice(_VALUES)
    return json.dumps(_replaced(value, path, new)).encode(), f"{shown} is {json.dumps(new)[:40]}", name


def _text_damage(rng: random.Random, text: str, name: str) -> tuple[bytes, str, str]:
    made = {
        "UTF-16": text.encode("utf-16"),
        "a byte order mark": text.encode("utf-8-sig"),
        "a comma too many": text.replace("}", ",}", 1).encode(),
        "a NUL": text.replace(":", ":\x00", 1).encode(),
        "twice the text": (text + text).encode(),
        "a line": b"\n",
        "spaces": b" " * 1000,
        "a megabyte of braces": b"{" * 2**20,
        "no UTF-8": b'{"x": "\xff\xfe"}',
    }
    what = rng.choice([*made, "15 million empty lists"])
    return made.get(what) or b"[" + b"[]," * 15_000_000 + b"[]]", f"JSON with {what}", name


def _places(value: object, path: tuple = ()) -> list[tuple]:
    """Every path in the value, the whole first."""
    inner = (
        value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    )
    return [path, *(place for key, item in inner for place in _places(item, (*path, key)))]


def _replaced(value: Any, path: tuple, new: object) -> object:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = _replaced(value[path[0]], path[1:], new)
    return copy


def _without(value: Any, path: tuple) -> object:
    copy = value.copy()
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = _without(value[path[0]], path[1:])
    return copy
