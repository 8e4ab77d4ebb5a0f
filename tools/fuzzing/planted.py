"""Pickles that would run code or eat the machine, if anything unpickled them.

Code is harmless: it makes one empty file, the canary. Bombs are sized so that a machine
outlives one that goes off.
"""

import random
import struct
from pathlib import Path
from typing import Any

_PROTO = b"\x80\x04"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def binary(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def name(module: str, attribute: str) -> bytes:
    """Looked up by STACK_GLOBAL, which follows dots."""
    return text(module) + text(attribute) + b"\x93"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def expressions(canary: Path) -> dict[str, bytes]:
    """Opcodes that leave one object behind and the canary on disk, by what they abuse."""
    shell, python = text(f"touch {canary}"), text(f"open({str(canary)!r}, 'w').close()")
    path, inner = text(str(canary)), _PROTO + call(name("os", "system"), text(f"touch {canary}")) + b"."
    evil = Path(f"{canary}.pickle")
    evil.write_bytes(inner)
    direct = {
        f"{module}.{attribute}": call(name(module, attribute), shell)
        for module, attribute in (
            *(
                ("os", "system"),
                ("posix", "system"),
                ("os", "popen"),
                ("subprocess", "getoutput"),
                ("posixpath", "os.system"),
            ),
            *(
                ("torch._utils", "os.system"),
                ("torch.serialization", "os.system"),
                ("collections", "_sys.modules.get"),
            ),
            *(
                ("torch.distributed.checkpoint.filesystem", "os.system"),
                ("torch.distributed.checkpoint.metadata", "os.system"),
            ),
            *(
                ("torch", "os.system"),
                ("torch.serialization", "tempfile._os.system"),
                ("pathlib", "os.system"),
                ("torch.utils", "os.system"),
            ),
        )
    }
    code = {
        f"{module}.{attribute}": call(name(module, attribute), python)
        for module, attribute in (
            ("builtins", "eval"),
            ("builtins", "exec"),
            ("__builtin__", "eval"),
            ("cProfile", "run"),
        )
    }
    return (
        direct
        | code
        | {
            "INST": b"(" + shell + b"ios\nsystem\n",
            "OBJ": b"(" + name("os", "system") + shell + b"o",
            "GLOBAL": b"cos\nsystem\n(" + shell + b"tR",
            "_import_dotted_name": call(
                call(name("torch._utils", "_import_dotted_name"), text("os.system")), shell
            ),
            "serialization._import_dotted_name": call(
                call(name("torch.serialization", "_import_dotted_name"), text("os.system")), shell
            ),
            "attrgetter": call(
                call(call(name("pathlib", "attrgetter"), text("system")), name("pathlib", "os")), shell
            ),
            "_itemgetter": call(
                call(
                    call(name("collections", "_itemgetter"), text("eval")),
                    name("collections", "__builtins__"),
                ),
                python,
            ),
            "getattr": call(
                call(name("builtins", "getattr"), name("collections", "_sys"), text("displayhook")), shell
            ),
            "namedtuple": call(name("collections", "namedtuple"), text("x"), text("y"))
            + b"0"
            + call(name("os", "system"), shell),
            "shutil.copyfile": call(
                name("torch.serialization", "shutil.copyfile"), text("/etc/hostname"), path
            ),
            "serialization.save": call(name("torch.serialization", "save"), text("x"), path),
            "serialization._open_file_like": call(
                name("torch.serialization", "_open_file_like"), path, text("wb")
            ),
            "serialization.load": call(name("torch.serialization", "load"), text(str(evil))),
            "serialization._legacy_load": call(
                name("torch.serialization", "_legacy_load"),
                call(name("io", "BytesIO"), binary(inner)),
                b"N",
                b"N",
            ),
            "torch.load": call(name("torch", "load"), text(str(evil))),
            "storage._load_from_bytes": call(name("torch.storage", "_load_from_bytes"), binary(inner)),
            "format_utils.torch_save_to_dcp": call(
                name("torch.distributed.checkpoint.format_utils", "torch_save_to_dcp"),
                text(str(evil)),
                text(f"{canary}.folder"),
            ),
            "filesystem.pickle.loads": call(
                name("torch.distributed.checkpoint.filesystem", "pickle.loads"), binary(inner)
            ),
            "utils.pickle.loads": call(name("torch._utils", "pickle.loads"), binary(inner)),
            "Path.touch": call(name("pathlib", "Path.touch"), call(name("pathlib", "Path"), path)),
            "PosixPath.write_text": call(
                name("pathlib", "PosixPath.write_text"), call(name("pathlib", "PosixPath"), path), text("x")
            ),
            "io.open": call(name("pathlib", "io.open"), path, text("w")),
            "builtins.open": call(name("builtins", "open"), path, text("w")),
            "functools.partial": call(call(name("functools", "partial"), name("os", "system")), shell),
            "operator.methodcaller": call(
                call(name("operator", "methodcaller"), text("touch")),
                call(name("pathlib", "PosixPath"), path),
            ),
            "importlib": call(
                name("builtins", "getattr"),
                call(name("importlib", "import_module"), text("os")),
                text("system"),
            )
            + b"("
            + shell
            + b"tR",
            "subprocess.Popen": call(name("subprocess", "Popen"), b"](" + text("touch") + path + b"e"),
            "torch.jit": call(name("torch.jit._script", "os.system"), shell),
            "numpy": call(name("numpy.f2py.crackfortran", "myeval"), python),
            "BUILD of a class": name("collections", "OrderedDict")
            + b")R}"
            + text("__class__")
            + name("subprocess", "Popen")
            + b"sb"
            b"0" + call(name("os", "system"), shell),
            "a class of torch's, called": call(
                name("torch.distributed.checkpoint.filesystem", "FileSystemWriter"), path
            )
            + b"0"
            + call(
                name("torch.distributed.checkpoint.filesystem", "FileSystem.mkdir"),
                b"N",
                call(name("pathlib", "PosixPath"), path),
            ),
        }
    )


def bombs() -> dict[str, bytes]:
    """Opcodes that cost memory or time."""
    twice = b"2\x86"
    return {
        "a memo of 2**27": b"]r" + struct.pack("<I", 2**27),
        "8-byte length 2**40": b"\x8e" + struct.pack("<Q", 2**40),
        "8-byte length 2**62": b"\x8d" + struct.pack("<Q", 2**62),
        "bytearray of 2**33": b"\x96" + struct.pack("<Q", 2**33),
        "text of 2**31": b"X" + struct.pack("<I", 2**31),
        "integer of 2**31 bytes": b"\x8b" + struct.pack("<i", 2**31 - 1),
        "a negative length": b"\x8b" + struct.pack("<i", -5),
        "a frame of 2**62": b"\x95" + struct.pack("<Q", 2**62) + b"N",
        "a key that is hashed for ever": b"})" + twice * 45 + b"Ns",
        "a set whose member is hashed for ever": b"\x8f()" + twice * 45 + b"\x90",
        "a value that is printed for ever": b")" + twice * 40,
        "half a million nested lists": b"]" * 500_000 + b"a" * 499_999,
        "a text of digits": b"I" + b"9" * 100_000 + b"\n",
        "a persistent id": b"Px\n",
        "an extension code": b"\x82\x01",
        "a vast torch.Size": call(name("torch", "Size"), b"(" + (b"J\xff\xff\xff\x7f" * 64) + b"t"),
        "a range": call(name("builtins", "set"), call(name("builtins", "range"), b"J\xff\xff\xff\x0f")),
        "_codecs.encode": call(name("_codecs", "encode"), text("A" * 1000), text("bz2")),
        "a vast meta tensor": call(
            name("torch._utils", "_rebuild_meta_tensor_no_storage"),
            name("torch", "float32"),
            b"J\xff\xff\xff\x7f\x85",
            b"K\x01\x85",
            b"\x89",
        ),
    }


def planted(rng: random.Random, canary: Path, around: bytes | None = None) -> tuple[bytes, str]:
    """A hostile pickle; with `around`, inside a valid one.

    Returns:
        bytes and description.
    """
    chosen: Any = expressions(canary) if rng.random() < 0.75 else bombs()
    what = rng.choice(list(chosen))
    hostile = chosen[what]
    if around is not None and rng.random() < 0.6:
        return _PROTO + hostile + b"0" + around[2:], f"{what}, then a valid pickle"
    return _PROTO + hostile + b".", what
