"""Damaged datasets, finished and half done, read by training, sampling and encoding."""

import json
import random
import shutil
import struct
from pathlib import Path

import numpy as np

from fuzzing import encoding
from fuzzing.boundary import Boundary, Input, Outcome, Wrong, command, judged
from fuzzing.media import write_picture
from fuzzing.mutate import bytes_damage, json_damage
from fuzzing.weights import header_damage

SAMPLES = 8
_RECIPE = """
from dataclasses import replace

from megatron_apt.config import DataConfig, OptimizerConfig, RunConfig
from megatron_apt.families.mmdit.config import MMDiTConfig
from megatron_apt.models.config import ModelConfig


def run() -> RunConfig:
    model = MMDiTConfig(depth=3, width=24, heads=2, latent_channels={channels}, text_width=8)
    data = DataConfig(shards=({dataset!r},), text_length=4)
    optimizer = OptimizerConfig(kind="adamw", lr=1e-3, ema=0.9)
    run = RunConfig(method="{method}", output={output!r}, model=model, data=data, optimizer=optimizer)
    return replace(run, iterations=1, global_batch={batch}, micro_batch={batch}, tensorboard=False)
"""


def recipe(file: Path, dataset: Path, output: Path, method: str = "flow", batch: int = SAMPLES) -> str:
    """Writes FILE.py with a recipe that trains one iteration; returns FILE.py:run."""
    file.write_text(
        _RECIPE.format(channels=12, dataset=str(dataset), output=str(output), method=method, batch=batch),
        encoding="utf-8",
    )
    return f"{file}:run"


def write_dataset(valid: Path) -> None:
    """A dataset of two shards in valid/data, the files it was made of in valid/files, and
    one half done in valid/half.
    """
    encoding.write_tokenizer(valid / "tokenizer.model")
    (valid / "files").mkdir()
    for i in range(SAMPLES):
        write_picture(valid / "files" / f"{i}.png", i)
        (valid / "files" / f"{i}.txt").write_text(f"picture {i}", encoding="utf-8")
    done = _encoded(valid, valid / "data")
    assert done.code == 0, done.said
    shutil.copytree(valid / "data", valid / "half")
    _undo(valid / "half")


def _encoded(valid: Path, output: Path):
    return encoding.encode(valid / "files", output, valid, "--samples-per-shard", SAMPLES // 2)


def _undo(folder: Path) -> None:
    """As if the encoding had been killed after its first shard."""
    info = json.loads((folder / "dataset.json").read_text())
    lines = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    first = [
        {key: value for key, value in line.items() if key != "id"}
        for line in lines
        if line["shard"] == "shard-00000.tar"
    ]
    (folder / "shard-00000.done").write_text(json.dumps({"index": first, "rejected": []}) + "\n")
    (folder / "encode.json").write_text(json.dumps(info["settings"]) + "\n")
    for name in (
        "dataset.json",
        "index.jsonl",
        "conditions.safetensors",
        "rejected.jsonl",
        "shard-00001.tar",
    ):
        (folder / name).unlink(missing_ok=True)


# --- a finished dataset


def _make(rng: random.Random, valid: Path, folder: Path) -> Input:
    data = folder / "data"
    shutil.copytree(valid / "data", data)
    how = rng.choice((_info, _info, _index, _index, _index, _conditions, _shard, _shard, _tokenizer, _files))
    return how(rng, data)


def _info(rng: random.Random, data: Path) -> Input:
    file = data / "dataset.json"
    text, what, name = json_damage(rng, json.loads(file.read_text()))
    file.write_bytes(text)
    return Input(f"dataset.json: {what}", ("dataset.json", name))


def _index(rng: random.Random, data: Path) -> Input:
    """Lines damaged, swapped, doubled, lost, or pointing elsewhere."""
    file = data / "index.jsonl"
    lines = file.read_text().splitlines()
    how, place = rng.random(), rng.randrange(len(lines))
    must_see = how < 0.55
    if how < 0.15:
        other = (place + 1) % len(lines)
        lines[place], lines[other] = lines[other], lines[place]
        what = f"lines {place + 1} and {other + 1} swapped"
    elif how < 0.3:
        lines[place] = lines[place - 1]
        what = f"line {place + 1} replaced by the one before"
    elif how < 0.55:
        line = json.loads(lines[place])
        what = _misplaced(rng, line)
        lines[place] = json.dumps(line)
    else:
        text, what, _ = json_damage(rng, json.loads(lines[place]))
        lines[place] = text.decode("utf-8", errors="surrogateescape")
    file.write_bytes("\n".join([*lines, ""]).encode("utf-8", errors="surrogateescape"))
    return Input(f"index.jsonl:{place + 1}: {what}", ("index.jsonl", "shard-0000"), must_see)


def _misplaced(rng: random.Random, line: dict) -> str:
    """Makes a line point where nothing of it is."""
    wrong = rng.choice((-1, -512, 10**6, 10**12, 2**63, 1e30))
    made = {
        "offset": lambda: line["latent"].__setitem__(0, wrong),
        "size": lambda: line["latent"].__setitem__(1, wrong),
        "offset by 512": lambda: line["text"].__setitem__(0, line["text"][0] + 512),
        "shape": lambda: line.__setitem__("latent_shape", [12, 1, 99, 99]),
        "vast shape": lambda: line.__setitem__("latent_shape", [10**6, 10**6, 10**6, 10**6]),
        "text length": lambda: line.__setitem__("text_length", 10**9),
        "shard elsewhere": lambda: line.__setitem__(
            "shard", rng.choice(("../data/shard-00000.tar", "/dev/zero", "/etc/passwd", "", "nothere.tar"))
        ),
    }
    what = rng.choice(list(made))
    made[what]()
    return f"{what} ({wrong})"


def _conditions(rng: random.Random, data: Path) -> Input:
    file = data / "conditions.safetensors"
    damaged, what = (header_damage if rng.random() < 0.7 else bytes_damage)(rng, file.read_bytes())
    file.write_bytes(damaged)
    return Input(f"conditions.safetensors: {what}", (file.name, "null", "negative"))


def _shard(rng: random.Random, data: Path) -> Input:
    """Bytes of a shard, or one of its arrays replaced by a hostile one of the same length."""
    file = data / f"shard-0000{rng.randrange(2)}.tar"
    content = bytearray(file.read_bytes())
    if rng.random() < 0.6:
        line = next(
            line
            for line in map(json.loads, (data / "index.jsonl").read_text().splitlines())
            if line["shard"] == file.name
        )
        start, size = line[rng.choice(("latent", "text"))]
        made, what = _hostile_array(rng, size)
        content[start : start + size] = made
        file.write_bytes(content)
        return Input(f"{file.name}: an array with {what}", (file.name,), must_see=True)
    damaged, what = _tar_header(rng, content) if rng.random() < 0.5 else bytes_damage(rng, bytes(content))
    file.write_bytes(damaged)
    return Input(f"{file.name}: {what}", (file.name,))


def _hostile_array(rng: random.Random, size: int) -> tuple[bytes, str]:
    headers = {
        "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "a vast shape": "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000, 1000), }",
        "a negative shape": "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 16), }",
        "another type": "{'descr': '<f8', 'fortran_order': False, 'shape': (3, 1), }",
        "code as header": "__import__('os').system('false')",
        "a deep header": "(" * 5000 + ")" * 5000,
        "a long type": "{'descr': '<U1000000000', 'fortran_order': False, 'shape': (1,), }",
        "records": "{'descr': [('a', '<f4'), ('b', '|O')], 'fortran_order': False, 'shape': (1,), }",
    }
    what = rng.choice([*headers, "a pickle", "zeros"])
    if what == "zeros":
        return bytes(size), what
    if what == "a pickle":
        return (b"\x80\x04cos\nsystem\nX\x05\0\0\0false\x85R." + bytes(size))[:size], what
    header = headers[what].encode()
    return (
        b"\x93NUMPY\x01\0"
        + struct.pack("<H", min(len(header), 65_535))
        + header
        + np.zeros(size // 4 + 1, "<f4").tobytes()
    )[:size], what


def _tar_header(rng: random.Random, content: bytearray) -> tuple[bytes, str]:
    """The first member's name, size, kind or sum."""
    made = {
        "../": (0, b"../../../../tmp/out\0"),
        "an absolute name": (0, b"/tmp/out\0"),
        "10 GB": (124, b"112402762000"),
        "a negative size": (124, b"\xff" * 12),
        "a symbolic link": (156, b"2/etc/passwd\0"),
        "a hard link": (156, b"1../x\0"),
        "a device": (156, b"4"),
        "a sparse file": (156, b"S"),
        "a wrong sum": (148, b"0000000\0"),
        "a long name": (156, b"L"),
    }
    what = rng.choice(list(made))
    place, value = made[what]
    content[place : place + len(value)] = value
    return bytes(content), f"its first member with {what}"


def _tokenizer(rng: random.Random, data: Path) -> Input:
    file = data / "tokenizer.model"
    damaged, what = bytes_damage(rng, file.read_bytes())
    file.write_bytes(damaged)
    return Input(f"tokenizer.model: {what}", (file.name,), settings={"sample": True})


def _files(rng: random.Random, data: Path) -> Input:
    """A file missing, empty, or of another kind."""
    file = data / rng.choice(
        ("dataset.json", "index.jsonl", "conditions.safetensors", "shard-00000.tar", "tokenizer.model")
    )
    how = rng.choice(("missing", "empty", "a folder", "a pipe", "/dev/zero", "a dangling link", "no samples"))
    if how == "no samples":
        info = json.loads((data / "dataset.json").read_text())
        (data / "dataset.json").write_text(json.dumps({**info, "samples": 0, "shapes": {}}))
        (data / "index.jsonl").write_bytes(b"")
        return Input("a dataset of no samples", ("index.jsonl", "dataset.json", "data"), must_see=True)
    replace(file, how)
    return Input(
        f"{file.name}: {how}",
        (file.name,),
        must_see=file.name not in ("tokenizer.model",),
        settings={"sample": file.name == "tokenizer.model"},
    )


def replace(file: Path, how: str) -> None:
    """The file becomes something else."""
    import os

    file.unlink()
    made = {
        "empty": lambda: file.touch(),
        "a folder": lambda: file.mkdir(),
        "a pipe": lambda: os.mkfifo(file),
        "/dev/zero": lambda: file.symlink_to("/dev/zero"),
        "a dangling link": lambda: file.symlink_to(file.parent / "nowhere"),
    }
    made.get(how, lambda: None)()


def _run(case: Input, valid: Path, folder: Path) -> Outcome:
    """One iteration of training over every sample; for the tokenizer a prompt is sampled."""
    if case.settings.get("sample"):
        command_line = (
            "sample",
            valid / "run",
            "--dataset",
            folder / "data",
            "--prompts",
            "picture 1",
            "--out",
            folder / "samples",
        )
    else:
        command_line = ("train", recipe(folder / "recipe.py", folder / "data", folder / "run"))
    found = judged(command(*command_line), case, folder / "data")
    if case.must_see and found.kind == "fine":
        raise Wrong("trained on, though the damage shows")
    return found


def write_run(valid: Path) -> None:
    """A dataset, and in valid/run a run of two commits on it."""
    write_dataset(valid)
    spec = recipe(valid / "recipe.py", valid / "data", valid / "run")
    done = command("train", spec, "--iterations", 2, "--save-every", 1, "--retention.last", 0)
    assert done.code == 0, done.said


def warm_run(valid: Path, folder: Path) -> None:
    for done in (
        command("train", recipe(folder / "recipe.py", valid / "data", folder / "run")),
        command("checkpoint", "inspect", valid / "run"),
    ):
        assert done.code == 0, done.said


DATASETS = Boundary("datasets", 12, write_run, _make, _run, warm_run)


# --- a half-done one


def _make_half(rng: random.Random, valid: Path, folder: Path) -> Input:
    half = folder / "half"
    shutil.copytree(valid / "half", half)
    if rng.random() < 0.1:
        return _lock(rng, half)
    file = half / rng.choice(
        ("encode.json", "shard-00000.done", "shard-00000.done", "shard-00000.tar", "tokenizer.model")
    )
    if rng.random() < 0.25:
        how = rng.choice(("missing", "empty", "a folder", "a pipe", "a dangling link"))
        replace(file, how)
        return Input(f"{file.name}: {how}", (file.name, str(half)))
    if file.suffix in (".json", ".done"):
        damaged, what, name = json_damage(rng, json.loads(file.read_text()))
    else:
        (damaged, what), name = bytes_damage(rng, file.read_bytes()), ""
    file.write_bytes(damaged)
    return Input(f"{file.name}: {what}", tuple(filter(None, (file.name, name))))


def _lock(rng: random.Random, half: Path) -> Input:
    """Something else where the lock of a running program would be."""
    file = half / ".lock"
    file.touch()
    how = rng.choice(("a folder", "a pipe", "a dangling link"))
    replace(file, how)
    return Input(f".lock: {how}", (".lock",))


def _run_half(case: Input, valid: Path, folder: Path) -> Outcome:
    """The encoding goes on; where it says it is done, the dataset is trained on."""
    found = judged(_encoded(valid, folder / "half"), case, folder / "half")
    if found.kind != "fine":
        return found
    lines = (folder / "half" / "index.jsonl").read_text().splitlines()
    if len(lines) != SAMPLES:
        raise Wrong(f"the dataset that was gone on with has {len(lines)} of {SAMPLES} samples")
    trained = judged(
        command("train", recipe(folder / "recipe.py", folder / "half", folder / "run")), case, folder / "half"
    )
    return trained


ENCODINGS = Boundary("encodings", 6, write_run, _make_half, _run_half, warm_run)
