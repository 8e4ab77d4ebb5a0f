"""Damaged and hostile folders of Hugging Face models: config.json, weights, tokenizers
and indices of pipelines of every family.
"""

import json
import os
import random
import shutil
from pathlib import Path

from fuzzing import encoding
from fuzzing.boundary import Boundary, Input, Outcome, Wrong, command, judged, worst
from fuzzing.datasets import replace
from fuzzing.media import SIZE
from fuzzing.mutate import bytes_damage, json_damage
from fuzzing.planted import planted
from fuzzing.weights import header_damage, joined, split

FAMILIES = ("wan", "sd3", "flux", "hunyuan")
_CODEC = {"wan": "wan", "sd3": "kl", "flux": "kl", "hunyuan": "hunyuan"}
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_SPLIT = "diffusion_pytorch_model.safetensors.index.json"
_SECRET = "not to be published"
_HUGE = (10**9, 10**18, 2**63, 10**30, 10**400, -1, 0, 1e400, 1.5, True, "4", None, [], [10**9], 3, 7)


def write_pipelines(valid: Path) -> None:
    """A tiny pipeline of each family, as diffusers saves them, and a checkpoint of ours
    imported from the first.
    """
    from support.pipelines import save_flux, save_hunyuan, save_sd3, save_wan

    encoding.write_tokenizer(valid / "tokenizer.model")
    source = valid / "source"
    source.mkdir()
    encoding.write_control(source)
    for save in (save_wan, save_sd3, save_flux, save_hunyuan):
        save(valid)
    done = command("convert", "import", valid / "wan", valid / "run")
    assert done.code == 0, done.said


# --- config.json


def _make_config(rng: random.Random, valid: Path, folder: Path) -> Input:
    """A field of one of the configurations changed."""
    family = rng.choice(FAMILIES)
    shutil.copytree(valid / family, folder / "pipeline")
    part = rng.choice(
        (
            "transformer",
            "transformer",
            "transformer",
            "vae",
            "text_encoder",
            "model_index",
            "model_index",
            "scheduler",
        )
    )
    file = _config_of(folder / "pipeline", part)
    config = json.loads(file.read_text())
    if rng.random() < 0.4 and part != "model_index":
        numbers = [
            key
            for key, value in config.items()
            if isinstance(value, int | float | list) and not isinstance(value, bool)
        ]
        name, value = rng.choice(numbers or list(config)), rng.choice(_HUGE)
        text, what = (
            json.dumps({**config, name: value}).replace("Infinity", "1e400").encode(),
            f"{name} is {str(value)[:40]}",
        )
    else:
        text, what, name = json_damage(rng, config)
    file.write_bytes(text)
    names = (str(file.relative_to(folder)), file.name, name or "config")
    return Input(f"{family} {part}: {what}", names, settings={"family": family, "part": part})


def _config_of(pipeline: Path, part: str) -> Path:
    return pipeline / {"model_index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}.get(
        part, f"{part}/config.json"
    )


# --- weights


def _make_weights(rng: random.Random, valid: Path, folder: Path) -> Input:
    """The weights of a transformer, a VAE or a text encoder: header, numbers, names,
    several files and their index.
    """
    family = rng.choice(FAMILIES)
    shutil.copytree(valid / family, folder / "pipeline")
    part = rng.choice(("transformer", "transformer", "transformer", "vae", "text_encoder"))
    place = folder / "pipeline" / part
    file = next(iter(sorted(place.glob("*.safetensors"))))
    how = rng.choice((_header, _header, _header, _renamed, _index, _other_file, _pickle))
    what, must_see, canary = how(rng, file, folder)
    names = (file.name, _SPLIT, part, "the codec overflows")
    return Input(f"{family} {part}: {what}", names, must_see, canary, {"family": family, "part": part})


def _header(rng: random.Random, file: Path, folder: Path) -> tuple[str, bool, None]:
    data, what = (header_damage if rng.random() < 0.7 else bytes_damage)(rng, file.read_bytes())
    file.write_bytes(data)
    return what, False, None


def _renamed(rng: random.Random, file: Path, folder: Path) -> tuple[str, bool, None]:
    """Names as other programs write them."""
    header, numbers = split(file.read_bytes())
    prefix = rng.choice(
        ("model.", "diffusion_model.", "module.", "_orig_mod.", "model.diffusion_model.", "x.", "lora_unet_")
    )
    suffix = rng.choice(("", "", ".lora_A.weight", ".lora_down.weight"))
    file.write_bytes(
        joined(
            {
                f"{prefix}{name}{suffix}" if name != "__metadata__" else name: entry
                for name, entry in header.items()
            },
            numbers,
        )
    )
    return f"names with {prefix}...{suffix}", prefix == "lora_unet_" or bool(suffix), None


def _index(rng: random.Random, file: Path, folder: Path) -> tuple[str, bool, None]:
    header, _ = split(file.read_bytes())
    whole = {
        "metadata": {"total_size": 1},
        "weight_map": {name: file.name for name in header if name != "__metadata__"},
    }
    name = next(iter(whole["weight_map"]))
    elsewhere = rng.choice(
        (
            "../../../../etc/passwd",
            "/dev/zero",
            "nothere.safetensors",
            "",
            ".",
            "\x00",
            f"../{file.parent.name}/{file.name}",
        )
    )
    text, what, _ = (
        json_damage(rng, whole) if rng.random() < 0.6 else (None, f"index: {name} in {elsewhere!r}", "")
    )
    if text is None:
        whole["weight_map"][name] = elsewhere
        text = json.dumps(whole).encode()
    file.with_name(_SPLIT if file.name == _WEIGHTS else f"{file.name}.index.json").write_bytes(text)
    return what, False, None


def _other_file(rng: random.Random, file: Path, folder: Path) -> tuple[str, bool, None]:
    how = rng.choice(("missing", "empty", "a folder", "a pipe", "/dev/zero", "a dangling link"))
    replace(file, how)
    return how, True, None


def _pickle(rng: random.Random, file: Path, folder: Path) -> tuple[str, bool, Path]:
    """A hostile pickle, under any name that a loader might take."""
    canary = folder / "canary"
    data, what = planted(rng, canary)
    name = rng.choice(
        (
            "diffusion_pytorch_model.bin",
            "pytorch_model.bin",
            "model.pt",
            "diffusion_pytorch_model.ckpt",
            file.name,
        )
    )
    if rng.random() < 0.7:
        file.unlink()
    file.with_name(name).write_bytes(data)
    return f"{name}: {what}", not file.exists() or name == file.name, canary


# --- tokenizers, and code beside them


def _make_tokenizer(rng: random.Random, valid: Path, folder: Path) -> Input:
    family = rng.choice(FAMILIES)
    shutil.copytree(valid / family, folder / "pipeline")
    if rng.random() < 0.25:
        return _code(rng, folder, family)
    place = rng.choice(sorted(folder.glob("pipeline/tokenizer*")))
    file = rng.choice(sorted(path for path in place.iterdir() if path.is_file()))
    if rng.random() < 0.15:
        what, name = (
            rng.choice(("missing", "empty", "a folder", "a pipe", "/dev/zero", "a dangling link")),
            "",
        )
        replace(file, what)
    elif file.suffix == ".json" and rng.random() < 0.8:
        data, what, name = json_damage(rng, json.loads(file.read_text()))
        file.write_bytes(data)
    else:
        (data, what), name = bytes_damage(rng, file.read_bytes()), ""
        file.write_bytes(data)
    names = (file.name, place.name, name or place.name)
    return Input(
        f"{family} {place.name}/{file.name}: {what}", names, settings={"family": family, "part": "tokenizer"}
    )


def _code(rng: random.Random, folder: Path, family: str) -> Input:
    """Python files beside the models, and settings that ask for them."""
    canary, pipeline = folder / "canary", folder / "pipeline"
    code = f"open({str(canary)!r}, 'w').close()\nclass Evil:\n    pass\n"
    for place in (pipeline, *filter(Path.is_dir, pipeline.iterdir())):
        for name in (
            "evil.py",
            "pipeline.py",
            "tokenization_evil.py",
            "modeling_evil.py",
            "sitecustomize.py",
        ):
            (place / name).write_text(code)
    file, change = rng.choice(
        (
            (
                "tokenizer/tokenizer_config.json",
                {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}},
            ),
            (
                "tokenizer/tokenizer_config.json",
                {
                    "tokenizer_class": "Evil",
                    "auto_map": {"AutoTokenizer": "evil.Evil"},
                    "trust_remote_code": True,
                },
            ),
            (
                "text_encoder/config.json",
                {"auto_map": {"AutoModel": "modeling_evil.Evil"}, "trust_remote_code": True},
            ),
            ("text_encoder/config.json", {"_attn_implementation": "evil/kernel"}),
            ("model_index.json", {"tokenizer": ["evil", "Evil"]}),
            ("model_index.json", {"text_encoder": ["evil", "Evil"]}),
            ("model_index.json", {"vae": ["pipeline", "Evil"]}),
            ("model_index.json", {"_class_name": ["pipeline", "Evil"]}),
            ("model_index.json", {"tokenizer": ["os", "system"]}),
            ("model_index.json", {"../evil": ["transformers", "CLIPTokenizer"]}),
            ("vae/config.json", {"auto_map": {"AutoModel": "modeling_evil.Evil"}}),
            (
                "transformer/config.json",
                {"auto_map": {"AutoModel": "modeling_evil.Evil"}, "_class_name": "evil.Evil"},
            ),
        )
    )
    path = pipeline / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    part = (
        "transformer" if file.startswith("transformer") else "vae" if file.startswith("vae") else "tokenizer"
    )
    return Input(
        f"{family} {file} asks for code: {change}",
        (file, *change),
        canary=canary,
        settings={"family": family, "part": part},
    )


# --- a base that is copied into a folder to be published


def _make_base(rng: random.Random, valid: Path, folder: Path) -> Input:
    """Links out of the pipeline, pickles, devices and odd parts beside what belongs there."""
    shutil.copytree(valid / "wan", folder / "pipeline")
    (folder / "secret").write_text(_SECRET)
    place = folder / "pipeline" / rng.choice(("vae", "text_encoder", "tokenizer"))
    made = {
        "a link to a file outside": lambda: (place / "notes.txt").symlink_to(folder / "secret"),
        "a link to a folder outside": lambda: (place / "notes").symlink_to(folder, target_is_directory=True),
        "a relative link outside": lambda: (place / "notes.txt").symlink_to("../../secret"),
        "a link to itself": lambda: (place / "notes").symlink_to(place),
        "a link in place of config.json": lambda: replaced_by_link(place, folder / "secret"),
        "a part that is a link": lambda: (shutil.rmtree(place), place.symlink_to(folder)),
        "a pickle": lambda: (place / "pytorch_model.bin").write_bytes(planted(rng, folder / "canary")[0]),
        "a pickle called .ckpt": lambda: (place / "model.ckpt").write_bytes(
            planted(rng, folder / "canary")[0]
        ),
        "code": lambda: (place / "modeling.py").write_text(f"open({str(folder / 'canary')!r}, 'w')"),
        "a pipe": lambda: os.mkfifo(place / "notes.txt"),
        "/dev/zero": lambda: (place / "notes.txt").symlink_to("/dev/zero"),
        "a dangling link": lambda: (place / "notes.txt").symlink_to("nowhere"),
        "a file of 200 MB of holes": lambda: (
            (place / "notes.txt").touch() or os.truncate(place / "notes.txt", 200 << 20)
        ),
        "60 folders deep": lambda: place.joinpath(*["d"] * 60).mkdir(parents=True),
    }
    what = rng.choice(list(made))
    made[what]()
    return Input(f"{place.name}: {what}", (place.name, "notes"), canary=folder / "canary")


def replaced_by_link(place: Path, target: Path) -> None:
    file = sorted(path for path in place.iterdir() if path.suffix == ".json")[0]
    file.unlink()
    file.symlink_to(target)


def _run_base(case: Input, valid: Path, folder: Path) -> Outcome:
    """Exported: nothing from outside and no pickle may be in the folder."""
    found = judged(
        command("convert", "export", valid / "run", folder / "exported", "--base", folder / "pipeline"),
        case,
        folder / "pipeline",
    )
    for file in (folder / "exported").rglob("*"):
        if file.suffix in (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".py") or file.is_symlink():
            raise Wrong(f"the exported folder holds {file.relative_to(folder)}")
        if file.is_file() and file.stat().st_size < 10_000 and _SECRET.encode() in file.read_bytes():
            raise Wrong(f"{file.relative_to(folder)} holds what lies outside the base")
    return found


# --- what is done with them


def _run(case: Input, valid: Path, folder: Path) -> Outcome:
    """The command that reads the damaged part."""
    part, pipeline = case.settings["part"], folder / "pipeline"
    if part == "transformer":
        found = [judged(command("convert", "import", pipeline, folder / "run"), case, pipeline)]
        if found[0].kind == "fine" and random.Random(case.what).random() < 0.3:
            found.append(
                judged(command("convert", "export", folder / "run", folder / "exported"), case, pipeline)
            )
    elif part == "vae":
        codec = _CODEC[case.settings["family"]]
        done = encoding.encode(
            valid / "source", folder / "out", valid, "--codec", codec, "--codec-path", pipeline
        )
        found = [judged(done, case, pipeline)]
    elif part == "scheduler":
        found = [_export(case, valid, folder)]
    else:
        found = [judged(_with_its_text(valid, folder, pipeline), case, pipeline)]
        if part == "model_index" and case.settings["family"] == "wan":
            found.append(_export(case, valid, folder))
    if case.must_see and worst(found).kind == "fine":
        raise Wrong(f"read, though it is damaged: {found[0].message[:200]}")
    return worst(found)


def _with_its_text(valid: Path, folder: Path, pipeline: Path):
    size = ("--height", SIZE // 2, "--width", SIZE // 2, "--max-rejected", 1.0)
    return command(
        "encode", "--source", valid / "source", "--output", folder / "out", *size, "--text", pipeline
    )


def _export(case: Input, valid: Path, folder: Path) -> Outcome:
    """Our checkpoint into a pipeline like the damaged one."""
    if case.settings["family"] != "wan":
        return Outcome("fine")
    done = command("convert", "export", valid / "run", folder / "exported", "--base", folder / "pipeline")
    return judged(done, case, folder / "pipeline")


def _warm(valid: Path, folder: Path) -> None:
    for family in FAMILIES:
        for part in ("vae", "tokenizer"):
            place = folder / f"{family}-{part}"
            place.mkdir()
            (place / "pipeline").symlink_to(valid / family)
            found = _run(Input("valid", settings={"family": family, "part": part}), valid, place)
            assert found.kind == "fine", found


CONFIGS = Boundary("configs", 12, write_pipelines, _make_config, _run, _warm)
WEIGHTS = Boundary("weights", 10, write_pipelines, _make_weights, _run, _warm)
TOKENIZERS = Boundary("tokenizers", 6, write_pipelines, _make_tokenizer, _run, _warm)
BASES = Boundary("bases", 4, write_pipelines, _make_base, _run_base, _warm)
