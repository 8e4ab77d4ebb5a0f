"""Manifests, captions, and what may lie in a folder: odd encodings, odd names, odd kinds of files."""

import csv
import io
import json
import os
import random
from pathlib import Path

from fuzzing import encoding
from fuzzing.boundary import Boundary, Input, Outcome
from fuzzing.media import write_picture
from fuzzing.mutate import bytes_damage, json_damage

_ROWS = [{"path": f"{i}.png", "caption": f"picture {i}", "start": 0, "fps": 0} for i in range(4)]
_TEXTS = (
    "",
    " ",
    "\u2028",
    "a\u2028b",
    "\ufeffbom",
    "\x00",
    "a\x00b",
    "\u202eabc",
    "é" * 200,
    "𝕏" * 5000,
    "a,b,c",
    'a "quoted" b',
    '"',
    "a\nb",
    "a\r\nb",
    "=1+1",
)
_TEXTS += (
    "x" * 131_073,
    "\x1b[31mred",
    "../../../etc/passwd",
    "/dev/zero",
    "C:\\x.png",
    "-1",
    "nan",
    "1e400",
    "{}",
    "<b>",
    "%s%n",
    "\ud800",
    "日本語" * 30,
)


def _prepare(valid: Path) -> None:
    encoding.write_tokenizer(valid / "tokenizer.model")
    (valid / "pictures").mkdir()
    for i in range(4):
        write_picture(valid / "pictures" / f"{i}.png", i)
    encoding.write_control(valid / "pictures")


def _picture(valid: Path, path: Path) -> Path:
    path.write_bytes((valid / "pictures" / "0.png").read_bytes())
    return path


# --- manifests


def _manifest(rng: random.Random, valid: Path, folder: Path) -> Input:
    """One row, one value or the bytes of a manifest damaged; the row of the whole picture stays."""
    source = folder / "source"
    source.mkdir()
    for file in (valid / "pictures").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    rows = [{"path": "control.png", "caption": encoding.CONTROL, "start": "", "fps": ""}, *map(dict, _ROWS)]
    kind, how = rng.choice((".csv", ".jsonl")), rng.random()
    place = rng.randrange(1, len(rows))
    if how < 0.35:
        field, text = rng.choice(list(rows[0])), rng.choice(_TEXTS)
        rows[place][field] = text
        data, what, control = _written(rows, kind), f"row {place}: {field}={text[:20]!r}", True
    elif how < 0.65:
        data, what = _line_damage(rng, rows, kind, place)
        control = True
    elif how < 0.8:
        encoded = rng.choice(("utf-16", "utf-8-sig", "utf-16-le", "utf-32", "cp037"))
        rows[place]["caption"] = "naïve café"
        data, what, control = _written(rows, kind).decode().encode(encoded), f"in {encoded}", False
    else:
        data, what = bytes_damage(rng, _written(rows, kind))
        control = False
    (source / f"list{kind}").write_bytes(data)
    return Input(
        f"list{kind}: {what}",
        (f"list{kind}",),
        settings={"source": f"list{kind}", "control": control, "inputs": None},
    )


def _written(rows: list[dict], kind: str) -> bytes:
    if kind == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode("utf-8", errors="surrogatepass")


def _line_damage(rng: random.Random, rows: list[dict], kind: str, place: int) -> tuple[bytes, str]:
    """One line replaced."""
    lines = _written(rows, kind).split(b"\n")
    at = place + (kind == ".csv")
    if kind == ".jsonl":
        lines[at], what, _ = json_damage(rng, _ROWS[place - 1])
        lines[at] = lines[at].replace(b"\n", b" ")
    else:
        made = {
            "too many commas": b"1.png,a,b,c,d,e",
            "no commas": b"1.png",
            "a NUL": b"1.png,a\0b,,",
            "no UTF-8": b"1.png,caf\xe9,,",
            "a quote inside": b'1.png,a "b" c,,',
            "a field of 200,000": b"1.png," + b"x" * 200_000 + b",,",
            "nothing": b"",
            "commas": b",,,",
            "a lone return": b"1.png,a\rb,,",
            "U+2028": "1.png,a\u2028b,,".encode(),
        }
        what = rng.choice(list(made))
        lines[at] = made[what]
    return b"\n".join(lines), f"line {at + 1}: {what}"


# --- captions


def _caption(rng: random.Random, valid: Path, folder: Path) -> Input:
    source = folder / "source"
    source.mkdir()
    encoding.write_control(source)
    _picture(valid, source / "x.png")
    text = source / "x.txt"
    made = {
        "random bytes": lambda: text.write_bytes(rng.randbytes(rng.choice((1, 100, 100_000)))),
        "UTF-16": lambda: text.write_bytes(
            "a caption".encode(rng.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32")))
        ),
        "cp1252": lambda: text.write_bytes("café “x”".encode("cp1252")),
        "a mark": lambda: text.write_bytes(b"\xef\xbb\xbfa caption"),
        "an odd text": lambda: text.write_bytes(rng.choice(_TEXTS).encode("utf-8", errors="surrogatepass")),
        "40 MB": lambda: text.write_bytes(b"abcdefg " * 5_000_000),
        "70,000 bytes without a space": lambda: text.write_bytes(b"a" * 70_000),
        "1.5 MB of other letters": lambda: text.write_bytes(
            "".join(chr(c) for c in range(0x4E00, 0x9E00)).encode() * 25
        ),
        "a folder": lambda: text.mkdir(),
        "a pipe": lambda: os.mkfifo(text),
        "/dev/zero": lambda: text.symlink_to("/dev/zero"),
        "a loop of links": lambda: text.symlink_to(text),
    }
    what = rng.choice(list(made))
    made[what]()
    return Input(
        f"a caption of {what}", ("x.txt", "x.png"), settings={"source": ".", "control": True, "inputs": 2}
    )


# --- what lies in a folder


def _odd_file(rng: random.Random, valid: Path, folder: Path) -> Input:
    source = folder / "source"
    source.mkdir()
    encoding.write_control(source)
    path = source / rng.choice(("x.png", "x.mp4", "x.jpg"))
    made = {
        "a folder": lambda: path.mkdir(),
        "a pipe": lambda: os.mkfifo(path),
        "/dev/zero": lambda: path.symlink_to("/dev/zero"),
        "a dangling link": lambda: path.symlink_to(source / "nowhere"),
        "a loop of links": lambda: path.symlink_to(path),
        "a link to its own folder": lambda: (source / "again").symlink_to(source),
        "a link to the root": lambda: (source / "again").symlink_to(folder),
        "an empty file": lambda: path.touch(),
        "a text": lambda: path.write_text("not a picture"),
        "of a name that is no UTF-8": lambda: _picture(
            valid, Path(os.fsdecode(os.fsencode(source) + b"/caf\xe9.png"))
        ),
        "of a long name": lambda: _picture(valid, source / ("é" * 125 + ".png")),
        "of a name with a newline": lambda: _picture(valid, source / "a\nb.png"),
        "of macOS": lambda: (source / "._x.png").write_bytes(b"\0\5\x16\7" + bytes(100)),
        "a socket": lambda: _socket(path),
        "of no rights": lambda: _picture(valid, path).chmod(0),
        "deep": lambda: _deep(valid, source),
        "holes of 5 GB": lambda: os.truncate(_picture(valid, path), 5 << 30),
    }
    what = rng.choice(list(made))
    made[what]()
    if rng.random() < 0.8 and not what.startswith(("of", "a link", "deep")):
        path.with_suffix(".txt").write_text("odd")
    return Input(
        f"{path.name} is {what}", (path.name,), settings={"source": ".", "control": True, "inputs": None}
    )


def _socket(path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's address must be short
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


def _deep(valid: Path, source: Path) -> None:
    for _ in range(60):
        source = source / "d"
    source.mkdir(parents=True)
    _picture(valid, source / "x.png")


def _make(rng: random.Random, valid: Path, folder: Path) -> Input:
    how = rng.random()
    return (_manifest if how < 0.55 else _caption if how < 0.75 else _odd_file)(rng, valid, folder)


def _run(case: Input, valid: Path, folder: Path) -> Outcome:
    asked = case.settings
    done = encoding.encode(folder / "source" / asked["source"], folder / "out", valid)
    return encoding.outcome(done, case, folder, folder / "out", asked["inputs"], asked["control"])


FOLDERS = Boundary("folders", 14, _prepare, _make, _run, quiet=True)
