"""Files that the package writes and reads again beside checkpoints and datasets: logs,
results, progress, calibrations, figures of an evaluation.
"""

import json
import random
import shutil
from pathlib import Path

from fuzzing.boundary import Boundary, Input, Outcome, Wrong, command, judged
from fuzzing.datasets import recipe, replace, warm_run, write_run
from fuzzing.mutate import bytes_damage, json_damage
from fuzzing.weights import header_damage

_CALIBRATION = {
    "device": "a chip",
    "width": 64,
    "mlp_ratio": 4,
    "visual_tokens": 1024,
    "text_tokens": 77,
    "blocks": {"bf16": {"F": 0.01, "I": 0.01, "W": 0.01}, "fp8 current": {"F": 0.01, "I": 0.01, "W": 0.01}},
}
_NUMBERS = {"frechet": 1.5, "accuracy": 0.9, "diversity": 0.4, "samples": 160, "seconds_per_sample": 0.01}


def write_records(valid: Path) -> None:
    """A run, a calibration, and the folder of a demo with one row measured."""
    import torch
    from safetensors.torch import save_file

    from megatron_apt.demo import digits

    write_run(valid)
    (valid / "calibration.json").write_text(json.dumps(_CALIBRATION))
    demo = valid / "demo"
    files = digits.write_digit_images(demo / "data" / "images-files", count=40)
    pixels = ("--pixel-channels", 1, "--pixel-temporal", 1, "--frames", 1, "--text-width", 8)
    done = command(
        "encode",
        "--source",
        files,
        "--output",
        demo / "data" / "images",
        "--height",
        8,
        "--width",
        8,
        *pixels,
    )
    assert done.code == 0, done.said
    folder = demo / "evaluation" / "images"
    folder.mkdir(parents=True)
    (folder / "diffusion_25.json").write_text(json.dumps(_NUMBERS))
    captions = [
        json.loads(line)["caption"]
        for line in (demo / "data" / "images" / "index.jsonl").read_text().splitlines()
    ]
    shown = sum(min(2, captions.count(caption)) for caption in set(captions))
    save_file({"latents": torch.zeros(shown, 1, 1, 8, 8)}, folder / "diffusion_25.safetensors")
    (demo / "progress.json").write_text(
        json.dumps(
            {"quick": False, "done": ["images/encode", "images/flow"], "seconds": {"images/flow": 1.0}}
        )
    )
    (demo / "images" / "flow").mkdir(parents=True)
    shutil.copy(valid / "run" / "log.jsonl", demo / "images" / "flow" / "log.jsonl")
    done = command("report", "--root", demo)
    assert done.code == 0, done.said


def _make(rng: random.Random, valid: Path, folder: Path) -> Input:
    return rng.choice((_calibration, _log, _log, _demo, _demo))(rng, valid, folder)


def _calibration(rng: random.Random, valid: Path, folder: Path) -> Input:
    file = folder / "calibration.json"
    text, what, name = json_damage(rng, _CALIBRATION)
    file.write_bytes(text)
    line = [
        "schedule",
        "--ranks",
        "2",
        "--microbatches",
        "2",
        "--iterations",
        "1",
        "--evaluations",
        "0",
        "--calibration",
        str(file),
    ]
    return Input(f"calibration: {what}", (file.name, name or file.name), settings={"line": line})


def _log(rng: random.Random, valid: Path, folder: Path) -> Input:
    """The log of a run that goes on."""
    run = folder / "run"
    shutil.copytree(valid / "run", run)
    file = run / "log.jsonl"
    lines = file.read_text().splitlines()
    how, place = rng.random(), rng.randrange(len(lines))
    if how < 0.3:
        what = rng.choice(("missing", "empty", "a folder", "a pipe", "/dev/zero", "a dangling link"))
        replace(file, what)
    elif how < 0.45:
        data, what = bytes_damage(rng, file.read_bytes())
        file.write_bytes(data)
    else:
        text, what, _ = json_damage(rng, json.loads(lines[place]))
        file.write_bytes(
            b"\n".join(
                [
                    *(line.encode() for line in lines[:place]),
                    text,
                    *(line.encode() for line in lines[place + 1 :]),
                ]
            )
            + b"\n"
        )
    spec = recipe(folder / "recipe.py", valid / "data", run)
    intact = set(lines) & set(file.read_bytes().decode(errors="replace").split("\n")) if how >= 0.3 else set()
    return Input(
        f"log.jsonl: {what}",
        ("log.jsonl",),
        settings={"line": ["train", spec, "--iterations", "3"], "intact": intact},
    )


def _demo(rng: random.Random, valid: Path, folder: Path) -> Input:
    demo = folder / "demo"
    shutil.copytree(valid / "demo", demo)
    files = (
        "progress.json",
        "evaluation/images/diffusion_25.json",
        "evaluation/images/diffusion_25.safetensors",
        "images/flow/log.jsonl",
    )
    file = demo / rng.choice((*files, "data/images/dataset.json", "report.html", "results.json"))
    before = file.read_bytes()
    if rng.random() < 0.2:
        what = rng.choice(("missing", "empty", "a folder", "a pipe", "a dangling link"))
        replace(file, what)
    elif file.suffix == ".json":
        data, what, _ = json_damage(rng, json.loads(before))
        file.write_bytes(data)
    elif file.suffix == ".jsonl":
        first, *rest = before.splitlines()
        data, what, _ = json_damage(rng, json.loads(first))
        file.write_bytes(b"\n".join([data, *rest]) + b"\n")
    else:
        data, what = (header_damage if file.suffix == ".safetensors" else bytes_damage)(rng, before)
        file.write_bytes(data)
    return Input(
        f"demo/{file.relative_to(demo)}: {what}",
        (file.name,),
        settings={"line": ["report", "--root", str(demo)]},
    )


def _run(case: Input, valid: Path, folder: Path) -> Outcome:
    found = judged(command(*case.settings["line"]), case, folder)
    if intact := case.settings.get("intact"):
        kept = (folder / "run" / "log.jsonl").read_bytes().decode(errors="replace").split("\n")
        if lost := intact - set(kept):
            raise Wrong(f"{len(lost)} whole rows of the log were lost")
    return found


def _warm(valid: Path, folder: Path) -> None:
    warm_run(valid, folder)
    shutil.copytree(valid / "demo", folder / "demo")
    done = command("report", "--root", folder / "demo")
    assert done.code == 0, done.said


RECORDS = Boundary("records", 8, write_records, _make, _run, _warm)
