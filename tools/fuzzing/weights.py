"""Damage of safetensors headers."""

import json
import random
import struct

from fuzzing.mutate import json_damage

_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "", "X", None)


def split(data: bytes) -> tuple[dict, bytes]:
    """Header and numbers of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict | bytes, numbers: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + numbers


def header_damage(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A safetensors file whose header lies."""
    header, numbers = split(data)
    names = [name for name in header if name != "__metadata__"]
    name, how = rng.choice(names), rng.random()
    entry = header[name]
    if how < 0.1:
        length = rng.choice((0, 1, 7, 10**6, 10**8 + 1, 2**40, 2**63, 2**64 - 1))
        return joined(header, numbers, length), f"a header of {length} bytes, it says"
    if how < 0.2:
        return joined(
            {("x." + key if key == name else key): value for key, value in header.items()}, numbers
        ), f"{name} under another name"
    if how < 0.3:
        entry["dtype"] = rng.choice(_DTYPES)
        return joined(header, numbers), f"{name}: dtype {entry['dtype']}"
    if how < 0.45:
        entry["shape"] = rng.choice(
            (
                [],
                [0],
                [-1],
                [2**31, 2**31],
                [2**62, 4],
                [1] * 3000,
                [*entry["shape"], 1],
                entry["shape"][::-1],
                [1.5],
                ["1"],
                None,
            )
        )
        return joined(header, numbers), f"{name}: shape {str(entry['shape'])[:60]}"
    if how < 0.65:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            (
                [end, start],
                [0, 2**63],
                [-8, 0],
                [start + 1, end + 1],
                [0, end - start],
                [2**64, 2**64],
                [start],
                [],
                "x",
            )
        )
        return joined(header, numbers), f"{name}: data_offsets {entry['data_offsets']}"
    if how < 0.75:
        cut = rng.choice((0, 1, len(numbers) // 2))
        return joined(
            header, numbers[:cut] if rng.random() < 0.7 else numbers + bytes(64)
        ), f"numbers cut to {cut}, or too many"
    if how < 0.8:
        del header[name]
        return joined(header, numbers), f"{name} taken out of the header"
    text, what, _ = json_damage(rng, header)
    return joined(text, numbers), f"header: {what}"
