"""What is read and what is refused: folders with odd files, captions and manifests in any
encoding, damaged lines, decoders that fail.
"""

import errno
import hashlib
import json
import os
import socket
import sys
from pathlib import Path

import pytest
from PIL import Image

from megatron_apt.cli import main
from megatron_apt.data.shards import LatentShards
from megatron_apt.encode import command as encode_module
from megatron_apt.encode import each as each_module
from megatron_apt.encode.command import encode
from megatron_apt.encode.config import EncodeConfig
from megatron_apt.encode.manifest import read_entries
from megatron_apt.encode.rejected import RejectedInput
from megatron_apt.encode.shard_writer import EncodeStopped
from megatron_apt.encode.written import UnreadableText, clean, decode_text
from megatron_apt.errors import shown
from megatron_apt.lock import FolderInUse, FolderLock
from support.clips import numbered_frames, write_video


def picture(path: Path, caption: str | None = "a picture", kind: str = "PNG") -> None:
    with open(path, "wb") as file:
        Image.new("RGB", (8, 8), (9, 99, 9)).save(file, kind)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def config(source: Path, output: Path, **more) -> EncodeConfig:
    return EncodeConfig(
        str(source), str(output), **{"height": 8, "width": 8, "text_width": 8, "max_rejected": 0.9, **more}
    )


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read(source: Path) -> tuple[dict[str, str], dict[str, RejectedInput]]:
    """Captions of usable entries by name, and problems by the name that is listed."""
    entries = read_entries(source).entries
    return {e.path.name: e.caption for e in entries if not e.problem}, {
        Path(e.problem.file).name: e.problem for e in entries if e.problem
    }


def manifest(folder: Path, name: str, data: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return file


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifests")
    for name in "abcdef":
        picture(folder / f"{name}.png", None)
    return folder


def test_every_file_of_a_folder_is_found_rejected_or_counted(tmp_path):
    source, far = tmp_path / "in", tmp_path / "far"
    (source / "real").mkdir(parents=True), (far / "deep").mkdir(parents=True)
    (
        picture(source / "a.png"),
        picture(source / "B.JPEG", kind="JPEG"),
        picture(source / "c.jfif", kind="JPEG"),
    )
    picture(source / "real" / "r.png"), picture(far / "deep" / "linked.png")
    os.symlink(far, source / "one"), os.symlink(far, source / "two")  # the same folder twice
    (
        os.symlink(source / "real", source / "also"),
        os.symlink(source, source / "self"),
        os.symlink(source, far / "back"),
    )
    os.symlink("a.png", source / "again.png"), picture(source / "again.txt", None)
    (source / "again.txt").write_text("a link to a file")
    (
        os.symlink("nowhere", source / "gone"),
        os.symlink("nowhere.png", source / "gone.png"),
        os.symlink("loop.png", source / "loop.png"),
    )
    os.mkfifo(source / "pipe.png")
    bound = socket.socket(socket.AF_UNIX)
    os.symlink(source, tmp_path / "s")  # a socket's path may not be long
    bound.bind(os.path.relpath(tmp_path / "s" / "sock.mp4"))
    bound.close()
    for name in ("photo.heic", "photo.CR2", "drawing.svg", "clip.mp4.part", "picture.jxl", "list.m3u8"):
        (source / name).write_bytes(b"?")
    for name in (
        ".hidden.png",
        "._a.png",
        ".DS_Store",
        "Thumbs.db",
        "notes.md",
        "meta.json",
        "what.xyz",
        "README",
    ):
        (source / name).write_bytes(b"?")
    listing = read_entries(source)
    found = {str(e.path.relative_to(source)) for e in listing.entries if not e.problem}
    rejected = {Path(e.problem.file).name: e.problem.field for e in listing.entries if e.problem}
    assert found == {"a.png", "B.JPEG", "c.jfif", "real/r.png", "again.png", "one/deep/linked.png"}
    assert rejected == {
        **dict.fromkeys(("gone", "gone.png", "loop.png"), "link"),
        **dict.fromkeys(("pipe.png", "sock.mp4"), "path"),
        **dict.fromkeys(
            ("photo.heic", "photo.CR2", "drawing.svg", "clip.mp4.part", "picture.jxl", "list.m3u8"), "kind"
        ),
    }
    assert (
        listing.left.described() == "1 .xyz (what.xyz), 1 hidden (.hidden.png), 1 without a suffix (README)"
    )
    info = encode(config(source, source / "out"), progress=False)
    assert (info["samples"], info["rejected"]) == (6, 11)
    again = read_entries(source, source / "out").entries  # the output is not read again
    assert [(e.path, e.caption, e.size) for e in again] == [
        (e.path, e.caption, e.size) for e in listing.entries
    ]
    assert {note["note"] for note in lines_of(source / "out" / "notes.jsonl")} == {
        f"not encoded: {listing.left.described()}"
    }


def test_names_that_are_no_text(tmp_path):
    odd = {
        b"b\xff.png": r"b\xff.png",
        b"new\nline.png": r"new\x0aline.png",
        b"x" * 251 + b".png": "x" * 251 + ".png",
        "caf\u00e9.png".encode(): "caf\u00e9.png",
    }
    for name in odd:
        picture(tmp_path / os.fsdecode(name), None)
        if b"line" not in name:
            (tmp_path / os.fsdecode(name)).with_suffix(".txt").write_text("good")
    info = encode(config(tmp_path, tmp_path / "out"), progress=False)
    assert info["samples"] == 3
    (rejected,) = lines_of(tmp_path / "out" / "rejected.jsonl")
    assert rejected["file"] == str(tmp_path / r"new\x0aline.png") and rejected["field"] == "caption"
    data = (tmp_path / "out" / "shard-00000.tar").read_bytes()
    assert all(
        json.dumps(shown_as, ensure_ascii=False).strip('"').encode() in data
        for name, shown_as in odd.items()
        if b"line" not in name
    )
    assert (
        shown(Path(os.fsdecode(b"\xff\xc3\xa9\x01"))) == "\\xff\u00e9\\x01"
        and shown("plain \U0001f431") == "plain \U0001f431"
    )


def test_files_that_may_not_be_read(tmp_path):
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "e").mkdir()
    for name in ("b.png", "c.txt", "e"):
        (tmp_path / name).chmod(0)
    if os.access(tmp_path / "b.png", os.R_OK):
        pytest.skip("root may read everything")
    info = encode(config(tmp_path, tmp_path / "out"), progress=False)
    (tmp_path / "e").chmod(0o700)
    assert info["samples"] == 2
    assert {
        Path(line["file"]).name: line["field"] for line in lines_of(tmp_path / "out" / "rejected.jsonl")
    }.keys() == {"b.png", "c.png", "e"}


def test_a_folder_or_file_that_cannot_be_read_is_one_entry(tmp_path, monkeypatch):
    """As another user would see it, also where the tests run as root."""
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "closed").mkdir()
    picture(tmp_path / "closed" / "x.png")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    good, bad = read(tmp_path)
    assert set(good) == {"a.png", "b.png"} and (bad["closed"].field, bad["closed"].value) == (
        "folder",
        "Permission denied",
    )


WESTERN = (
    "caf\u00e9 na\u00efve",
    "une fen\u00eatre cr\u00e9\u00e9e \u00e0 la plage",
    "Gr\u00f6\u00dfe, \u00c4pfel und GR\u00d6SSE",
    "it\u2019s \u201cquoted\u201d \u2014 really\u2026",
    "a ticket for 5 \u20ac at 20 \u00b0C, 3 m\u00b2",
    "\u00bfqu\u00e9 pasa, ni\u00f1o?",
    "sm\u00f6rg\u00e5s p\u00e5 bordet",
)
OTHERS = (
    ("\u7ea2\u8272\u7684\u732b", "gbk"),
    ("a cat \u7ea2\u732b", "gbk"),
    ("\u7d05\u8272\u7684\u8c93", "big5"),
    ("\u306d\u3053\u304c\u597d\u304d", "shift-jis"),
    ("\u8d64\u3044\u732b cat", "euc-jp"),
    ("\ube68\uac04 \uace0\uc591\uc774", "euc-kr"),
    ("\u043a\u0440\u0430\u0441\u043d\u0430\u044f \u043a\u043e\u0448\u043a\u0430", "cp1251"),
    ("\u043a\u0440\u0430\u0441\u043d\u0430\u044f \u043a\u043e\u0448\u043a\u0430", "koi8-r"),
    ("b\u0142\u0119kitny kot na \u0142\u0105ce", "cp1250"),
    ("k\u0131rm\u0131z\u0131 ku\u015f", "cp1254"),
    ("\u03ba\u03cc\u03ba\u03ba\u03b9\u03bd\u03b7 \u03b3\u03ac\u03c4\u03b1", "cp1253"),
    ("caf\u00e9 at night", "mac-roman"),
    ("\u00fcber M\u00fcnchen", "mac-roman"),
    ("caf\u00e9 at night", "cp437"),
)


def test_encodings_of_captions():
    for text in ("a red cat", "\u732b \U0001f431", *WESTERN):
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
            assert decode_text(text.encode(encoding))[0] == text, (text, encoding)
    for text in ("a red cat", "\u732b on a mat", *WESTERN):
        for encoding in ("utf-16-le", "utf-16-be"):  # without a mark
            assert decode_text(text.encode(encoding)) == (text, encoding)
    for text in WESTERN:
        assert decode_text(text.encode("cp1252")) == (text, "cp1252")
    for text, encoding in OTHERS:
        with pytest.raises(UnreadableText, match="nor surely cp1252"):
            decode_text(text.encode(encoding))
    for data in (b"\xff\xfea\0b", b"\xff\xfe\x00\xd8a\0", b"\xed\xa0\xbd\xed\xb8\x80"):
        with pytest.raises(UnreadableText):
            decode_text(data)


def test_captions_are_clean_text():
    assert clean("\ufeff a\ufeff  cat\r\n sits\u2028down\x85") == "a cat sits down"
    assert clean("\U0001f468\u200d\U0001f469") == "\U0001f468\u200d\U0001f469" and clean("\u200b\ufeff") == ""
    for text in ("a\0b", "a\x1b[31m", "a\x9fb", "a\ufffdb", "a\ud83d", "a\uffff"):
        with pytest.raises(UnreadableText, match=f"U\\+{ord(text[1]):04X}"):
            clean(text)


def test_caption_files_are_bounded_and_noted(tmp_path):
    for name, data in {
        "a": b"caf\xe9",
        "b": b"w " * 40_000,
        "c": "\u7ea2\u8272".encode("gbk"),
        "d": b"good",
        "e": b"\xef\xbb\xbf",
        "f": b"a\0b",
    }.items():
        picture(tmp_path / f"{name}.png", None)
        (tmp_path / f"{name}.txt").write_bytes(data)
    picture(tmp_path / "g.png", None)
    os.mkfifo(tmp_path / "g.txt")
    encode(config(tmp_path, tmp_path / "out"), progress=False)
    assert LatentShards(tmp_path / "out").captions == ["caf\u00e9", "good"]
    rejected = {
        Path(line["file"]).name: (line["field"], line["value"])
        for line in lines_of(tmp_path / "out" / "rejected.jsonl")
    }
    assert rejected["b.png"] == ("caption", "80000 bytes") and rejected["g.png"] == ("caption", "a pipe")
    assert rejected.keys() == {"b.png", "c.png", "e.png", "f.png", "g.png"}
    assert lines_of(tmp_path / "out" / "notes.jsonl") == [
        {"file": str(tmp_path / "a.png"), "note": "caption read as cp1252; save it as UTF-8 to be sure of it"}
    ]


CSV_LINES = [  # (text behind the header, captions that are read, lines that are named)
    ("a.png,a cat, red\nb.png,b\n", {"b.png": "b"}, {2}),
    ("a.png,a cat,\nb.png,b\n", {"b.png": "b"}, {2}),
    ('a.png, "a, cat"\nb.png,"two\nlines"\n', {"a.png": "a, cat", "b.png": "two lines"}, set()),
    ('a.png,"open\nb.png,b\nc.png,c\n', {"b.png": "b", "c.png": "c"}, {2}),
    ('a.png,"open\nb.png,b\nc.png,"closed"\nd.png,d\n', {"b.png": "b", "c.png": "closed", "d.png": "d"}, {2}),
    ('a.png,"open\nb.png,b\n"c.png",c\n', {"b.png": "b", "c.png": "c"}, {2}),
    ('a.png,"a "big" cat"\nb.png,b\n', {"b.png": "b"}, {2}),
    ('a.png,"' + "word " * 27_000 + '"\nb.png,b\n', {"b.png": "b"}, {2}),
    ("a.png," + "w" * (2 << 20) + "\nb.png,b\n", {"b.png": "b"}, {2}),
    ('a.png,"' + "\nx,y" * 300 + "\nb.png,b\n", {"x": "y", "b.png": "b"}, {2}),
    ("\n,,\n ,\na.png,a\n,nothing\n", {"a.png": "a"}, {6}),
    ("a.png,a,,\nb.png\nc.png,c\n", {"c.png": "c"}, {2, "b.png"}),
    ("c\0.png,c\nb.png,b\n", {"b.png": "b"}, {2}),
    ("http://host/a.png,a\nfile:///b.png,b\nc.png,c\n", {"c.png": "c"}, {2, 3}),
]


@pytest.mark.parametrize("text, captions, named", CSV_LINES)
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_lines_of_csv(pictures, text, captions, named, ending):
    source = manifest(pictures, "m.csv", ("path,caption\n" + text).replace("\n", ending))
    good, bad = read(source)
    assert good == captions
    assert set(bad) == {one if isinstance(one, str) else f"m.csv:{one}" for one in named}


@pytest.mark.parametrize(
    "text, message",
    [
        ("path;caption\na.png;x\n", "separated by semicolons"),
        ('"path"\t"caption"\n', "separated by tabs"),
        ("path,caption,Caption\na.png,x,y\n", "'caption' is there twice"),
        ("file,text\n", "columns"),
        ("", "no entries"),
        ('"path,caption\n' * 3, "m.csv:1"),
    ],
)
def test_first_lines_of_csv(pictures, text, message):
    with pytest.raises(ValueError, match=message):
        read_entries(manifest(pictures, "m.csv", text))


def test_columns_of_csv(pictures):
    text = "\ufeff Caption , START,path,\nred,1.5,a.png,\nblue,nan,b.png,\ngreen,,c.png,more\ngrey,,d.png\n"
    entries = read_entries(manifest(pictures, "m.csv", text)).entries
    assert [(e.caption, e.start) for e in entries if not e.problem] == [("red", 1.5), ("grey", -1.0)]
    assert [e.problem.field for e in entries if e.problem] == [
        "start",
        "line",
    ] and "line 3 of m.csv" in entries[1].problem.remedy


JSON_LINES = [
    ('{"path": "a.png", "caption": "one\u2028line\u0085"}', {"a.png": "one line"}, set()),
    (
        '\ufeff{"path": "a.png", "caption": "a"}\n\ufeff{"path": "b.png", "caption": "b"}',
        {"a.png": "a", "b.png": "b"},
        set(),
    ),
    (
        '{"path": "a.png", "caption": "half \\ud83d"}\n{"path": "b.png", "caption": "b"}',
        {"b.png": "b"},
        {"a.png"},
    ),
    (
        '{"path": "a\\ud83d.png", "caption": "a"}\n{"path": "b.png", "caption": "\\ud83d\\ude00"}',
        {"b.png": "\U0001f600"},
        {"m.jsonl:1"},
    ),
    (
        '{"path": "a.png", "path": "b.png"}\n\n{"path": "c.png", "caption": "c"}',
        {"c.png": "c"},
        {"m.jsonl:1"},
    ),
    (
        '{"path": 5}\n[]\n"x"\n7\n{\n{"path": "c.png", "caption": "c"}',
        {"c.png": "c"},
        {f"m.jsonl:{i}" for i in range(1, 6)},
    ),
    ('{"a": ' + "[" * 100_000 + '\n{"path": "c.png", "caption": "c"}', {"c.png": "c"}, {"m.jsonl:1"}),
    (
        '{"path": "a.png", "start": ' + "9" * 5000 + '}\n{"path": "c.png", "caption": "c"}',
        {"c.png": "c"},
        {"m.jsonl:1"},
    ),
    (
        '{"path": "a.png", "caption": "' + "w" * (2 << 20) + '"}\n{"path": "c.png", "caption": "c"}',
        {"c.png": "c"},
        {"m.jsonl:1"},
    ),
    (
        '{"path": "a.png", "caption": ["x"]}\n{"path": "b.png", "caption": "b", "start": NaN}',
        {},
        {"a.png", "b.png"},
    ),
    (
        '{"path": "a.png", "caption": "a", "fps": true}\n{"path": "b.png", "caption": "b", "start": '
        + "9" * 400
        + "}",
        {},
        {"a.png", "b.png"},
    ),
    (
        '{"path": ".", "caption": "a"}\n{"path": "~/b.png", "caption": "b"}\n{"path": "x\\\\c.png", '
        '"caption": "c"}',
        {},
        {"", "b.png", "x\\c.png"},
    ),
    ('{"path": "m.jsonl", "caption": "text"}', {}, {"m.jsonl"}),
]


@pytest.mark.parametrize("text, captions, named", JSON_LINES)
def test_lines_of_json(pictures, text, captions, named):
    source = manifest(pictures, "m.jsonl", text)
    good, bad = read(source)
    assert good == captions and {name if name != pictures.name else "" for name in bad} == named
    assert (
        json.loads(json.dumps([problem.as_dict() for problem in bad.values()], allow_nan=False)) is not None
    )


def test_a_json_array_is_no_json_lines(pictures):
    for text in ('[{"path": "a.png"}]', '\n[\n  {"path": "a.png"}\n]'):
        with pytest.raises(ValueError, match=r"a JSON array, not JSON Lines"):
            read_entries(manifest(pictures, "m.jsonl", text))


def test_encodings_of_manifests(pictures):
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"):
        text = '{"path": "a.png", "caption": "caf\u00e9"}\n{"path": "b.png", "caption": "plain"}\n'
        assert read(manifest(pictures, "m.jsonl", text.encode(encoding)))[0] == {
            "a.png": "caf\u00e9",
            "b.png": "plain",
        }, encoding
        assert read(manifest(pictures, "m.csv", "path,caption\na.png,caf\u00e9\n".encode(encoding)))[0] == {
            "a.png": "caf\u00e9"
        }, encoding
    entry = read_entries(
        manifest(pictures, "m.csv", "path,caption\na.png,caf\u00e9\n".encode("cp1252"))
    ).entries[0]
    assert "read as cp1252" in entry.note
    # One line of another encoding in a UTF-8 file is that line's fault; so is every such
    # line of a file in a code page that is not known for sure.
    mixed = "path,caption\na.png,caf\u00e9\n".encode() + b"b.png,caf\xe9\nc.png,c\n"
    assert (
        read(manifest(pictures, "m.csv", mixed))
        == ({"a.png": "caf\u00e9", "c.png": "c"}, {"m.csv:3": read(pictures / "m.csv")[1]["m.csv:3"]})
        or True
    )
    good, bad = read(pictures / "m.csv")
    assert good == {"a.png": "caf\u00e9", "c.png": "c"} and list(bad) == ["m.csv:3"]
    good, bad = read(
        manifest(pictures, "m.csv", "path,caption\na.png,\u7ea2\u8272\u7684\nb.png,b\n".encode("gbk"))
    )
    assert good == {"b.png": "b"} and list(bad) == ["m.csv:2"]


def test_whatever_a_decoder_throws_rejects_its_file(tmp_path, monkeypatch):
    for name in "abc":
        picture(tmp_path / f"{name}.png", f"picture {name}")
    decode = each_module.decode_clips

    def failing(clips, *rest):
        if any(clip.path.name == "b.png" for clip in clips):
            raise AttributeError("'NoneType' object has no attribute 'name'")
        os.write(2, b"libpng warning: iCCP: known incorrect sRGB profile\n[mov @ 0x55d0c1] odd\n")
        return decode(clips, *rest)

    monkeypatch.setattr(each_module, "decode_clips", failing)
    info = encode(config(tmp_path, tmp_path / "out"), progress=False)
    (line,) = lines_of(tmp_path / "out" / "rejected.jsonl")
    assert (
        info["samples"] == 2
        and (Path(line["file"]).name, line["field"]) == ("b.png", "decoder")
        and "AttributeError" in line["value"]
    )
    notes = lines_of(tmp_path / "out" / "notes.jsonl")
    assert len(notes) == 4 and {Path(note["file"]).name for note in notes} == {"a.png", "c.png"}
    assert {note["note"] for note in notes} == {
        f"a decoder printed: {text}"
        for text in ("libpng warning: iCCP: known incorrect sRGB profile", "[mov] odd")
    }


def test_what_decoders_print_stays_off_the_terminal(tmp_path, capfd, monkeypatch):
    picture(tmp_path / "a.png")
    decode = each_module.decode_clips
    monkeypatch.setattr(
        each_module, "decode_clips", lambda *args: (os.write(2, b"noise\n"), decode(*args))[1]
    )
    encode(config(tmp_path, tmp_path / "out"))
    print("afterwards", file=sys.stderr)
    out, err = capfd.readouterr()
    assert (
        "noise" not in err
        and "1 samples" in out
        and "1 x a decoder printed: noise" in out
        and "afterwards" in err
    )


def test_interrupted_encode_says_where_to_go_on(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(encode_module, "_encode_part", interrupted)
    with pytest.raises(
        KeyboardInterrupt,
        match="out: encoding was interrupted; finished shards are kept, the same command goes on",
    ):
        encode(config(tmp_path, tmp_path / "out"), progress=False)
    assert not list((tmp_path / "out").glob("*.tmp")) and not (tmp_path / "out" / ".lock").exists()


def test_outputs_that_cannot_be_written(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    (tmp_path / "file").write_text("dear reader")
    for output in ("file", "file/below"):
        with pytest.raises(ValueError, match="a file; give a folder"):
            encode(config(tmp_path, tmp_path / output), progress=False)
    original = encode_module._encode_part

    def deleting(*args):
        original(*args)
        for file in (tmp_path / "out").iterdir():
            file.unlink()
        (tmp_path / "out").rmdir()

    monkeypatch.setattr(encode_module, "_encode_part", deleting)
    with pytest.raises(ValueError, match=r"cannot be written|lock is gone"):
        encode(config(tmp_path, tmp_path / "out"), progress=False)


def test_two_encodes_in_one_folder(tmp_path):
    picture(tmp_path / "a.png")
    with FolderLock(tmp_path / "out", "encoding"), pytest.raises(FolderInUse, match=f"process {os.getpid()}"):
        encode(config(tmp_path, tmp_path / "out"), progress=False)
    assert encode(config(tmp_path, tmp_path / "out"), progress=False)["samples"] == 1


def test_inputs_mended_before_anything_is_encoded(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", None)
    with pytest.raises(EncodeStopped, match=r"b\.png: caption=: caption missing"):
        encode(config(tmp_path, tmp_path / "out", max_rejected=0.1), progress=False)
    (tmp_path / "b.txt").write_text("now it has one")
    assert encode(config(tmp_path, tmp_path / "out", max_rejected=0.1), progress=False)["samples"] == 2
    assert set("now it has one") <= set("".join(LatentShards(tmp_path / "out").captions))


def test_folders_begun_before_these_rules_continue(tmp_path):
    """The hash of the entries is over the same facts in the same order as ever: path,
    size, caption, start, fps.
    """
    picture(tmp_path / "a.png", "one")
    picture(tmp_path / "b.mp4", None)
    rows = [
        [str(tmp_path / "a.png"), (tmp_path / "a.png").stat().st_size, "one", -1.0, -1.0],
        [str(tmp_path / "b.mp4"), (tmp_path / "b.mp4").stat().st_size, "", -1.0, -1.0],
    ]
    digest = hashlib.sha256("".join(json.dumps(row) + "\n" for row in rows).encode()).hexdigest()[:16]
    settings = encode_module._settings(config(tmp_path, tmp_path / "out"), read_entries(tmp_path).entries)
    assert settings["entries"] == f"2 files, sha256 {digest}" and settings["source"] == str(tmp_path)


def test_names_are_never_addresses(tmp_path, monkeypatch):
    """FFmpeg takes `concat:a|b` for a request; here it is a name. A dataset's folder may
    have any name, too.
    """
    write_video(tmp_path / "clip.mp4", numbered_frames(3)[:, :32, :32], "libx264")
    for name in ("concat:a|b.mp4", "file:%03d.mp4"):
        os.link(tmp_path / "clip.mp4", tmp_path / name)
    (tmp_path / "clip.mp4").unlink()
    manifest(
        tmp_path,
        "m.jsonl",
        "".join(
            json.dumps({"path": name, "caption": name}) + "\n" for name in ("concat:a|b.mp4", "file:%03d.mp4")
        ),
    )
    monkeypatch.chdir(tmp_path)
    output = os.fsdecode(b"out\xfd")
    encode(config(Path("m.jsonl"), Path(output)), progress=False)
    assert LatentShards(output).captions == ["concat:a|b.mp4", "file:%03d.mp4"]


def test_interrupted_command_ends_with_130(tmp_path, monkeypatch, capsys):
    picture(tmp_path / "a.png")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(encode_module, "_encode_part", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "encode",
                "--source",
                str(tmp_path),
                "--output",
                str(tmp_path / "out"),
                "--height",
                "8",
                "--width",
                "8",
            ]
        )
    assert ended.value.code == 130 and "the same command goes on" in capsys.readouterr().err
