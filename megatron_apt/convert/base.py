"""The pipeline beside whose other parts a generator is exported: whether it fits, and a
copy of what may be published of it.

Copied are regular files of known kinds that lie in the pipeline's folder, or in the cache
of a hub that it is a part of. Weights lose the name of their variant, so that the copy
loads as it is. Pickles, code and links that lead elsewhere are never copied.
"""

import json
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_apt.checkpoint import store
from megatron_apt.convert.counterpart import SECOND, Counterpart
from megatron_apt.convert.errors import ConvertError
from megatron_apt.convert.source import PART, read_json
from megatron_apt.encoders.weight_files import WeightFileError, announced, printable, weight_files
from megatron_apt.models.config import ModelConfig

SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
# What the other parts of a pipeline meet
_INTERFACE = ("latent_channels", "condition_channels", "patch", "text_width", "pooled_width")
# With what their files of weights are called
_LIBRARIES = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
_WITHOUT_WEIGHTS = ("Token", "Scheduler", "Processor", "Extractor")  # in the names of their classes
_KINDS = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".md", ".png", ".jpg", ".jpeg", ".webp")
_NAMES = ("LICENSE", "NOTICE")
# Fields of JSON files that name code for the libraries to run or to fetch.
_CODE = (
    "auto_map",
    "custom_pipelines",
    "trust_remote_code",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
)


@dataclass
class Copied:
    """What of a pipeline is copied.

    Attributes:
        files: where each comes from, by its place in the copy.
        texts: files that are written anew.
        left_out: places of what is not.
    """

    files: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def base_index(base: str, family: Counterpart, model: ModelConfig, one_step: bool, part: str) -> dict:
    """model_index.json of a pipeline that can take this model as `part`, all of whose
    other parts are there.

    Raises:
        ConvertError: it cannot, or they are not.
    """
    file = Path(base) / "model_index.json"
    if not file.is_file():
        raise ConvertError(f"{file} does not exist; --base wants the folder of a whole pipeline")
    index = read_json(file)
    _check_index(index, file, part, family)
    _check_interface(Path(base, part, "config.json"), family, model)
    for name in parts(index):
        if name not in left_behind(one_step, part) and not Path(base, name).is_dir():
            raise ConvertError(
                f"{file}: names {name}, and {Path(base, name)} is not there; download the whole pipeline"
            )
    return family.adapted(index, model, file, one_step)


def _check_index(index: dict, file: Path, part: str, family: Counterpart) -> None:
    """Raises ConvertError for an index without this part, or one that names code of its own."""
    if part != PART and not _is_part(index.get(part)):
        raise ConvertError(
            f"{file}: has no {part}, which this checkpoint was imported as; give the pipeline it came from, "
            f"or say --part {PART} to make it that"
        )
    if not _is_part(index.get(part)) or index[part][1] != family.architecture:
        raise ConvertError(
            f"{file}: its {part} is {printable(repr(index.get(part)))}, not a {family.architecture}; give a "
            "pipeline of this family"
        )
    if not isinstance(name := index.get("_class_name"), str) or not name.isidentifier():
        raise ConvertError(
            f"{file}: _class_name={printable(repr(name))} is no pipeline of diffusers; pipelines with code "
            "of their own are not copied"
        )
    for name in parts(index):
        if not name.isidentifier():
            raise ConvertError(
                f"{file}: {printable(repr(name))} names no part of a pipeline; download it again"
            )
        if not _is_part(index[name]):
            raise ConvertError(
                f"{file}: {name} is {printable(repr(index[name]))}, which is no class of "
                f"{' or '.join(_LIBRARIES)}; pipelines with code of their own are not copied"
            )


def _is_part(value: object) -> bool:
    """A library and one of its classes."""
    whole = isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)
    return whole and value[0] in _LIBRARIES and value[1].isidentifier() and not value[1].startswith("_")


def _check_interface(config: Path, family: Counterpart, model: ModelConfig) -> None:
    """Raises ConvertError where the base's own network meets its other parts in another way."""
    if not config.is_file():
        return
    theirs = family.model(read_json(config), config.parent)
    names = (*_INTERFACE, *family.interface)
    if differing := [name for name in names if getattr(theirs, name) != getattr(model, name)]:
        found = [getattr(shape, differing[0]) for shape in (theirs, model)]
        raise ConvertError(
            f"{config}: {differing[0]} is {found[0]}, of this checkpoint {found[1]}; give the pipeline it "
            "came from"
        )


def parts(index: dict) -> list[str]:
    """The parts of a pipeline that have folders."""
    return [name for name, value in index.items() if isinstance(value, list) and any(value)]


def left_behind(one_step: bool, part: str) -> tuple[str, ...]:
    """What is not copied of a base. Of a one-step model also its scheduler, and Wan2.2's
    second network, which takes over at less noise.
    """
    return (part, PART, SECOND, "scheduler") if one_step else (part,)


def alone(index: dict) -> dict:
    """The index of a pipeline whose one network makes a sample in one step."""
    index = index | {"scheduler": ["diffusers", SCHEDULER["_class_name"]]}
    return index | {
        name: value for name, value in ((SECOND, [None, None]), ("boundary_ratio", None)) if name in index
    }


def plan_copy(base: Path, index: dict, left: tuple[str, ...]) -> Copied:
    """What of the pipeline's parts is copied.

    Raises:
        ConvertError: a link that leads elsewhere, or a part that has no weights but a
            pickle's.
    """
    plan, roots = Copied(), _roots(base)
    for name in parts(index):
        if name not in left:
            _check_inside(base / name, roots)
            library, kind = index[name]
            _plan_part(
                base / name,
                "" if any(word in kind for word in _WITHOUT_WEIGHTS) else _LIBRARIES[library],
                roots,
                plan,
            )
    return plan


def _roots(base: Path) -> list[Path]:
    """The folders that files of a pipeline may lie in: its own, and in a hub's cache
    (REPOSITORY/snapshots/COMMIT) the REPOSITORY/blobs.
    """
    real = base.resolve()
    cached = real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--")
    return [real, real.parent.parent / "blobs"] if cached else [real]


def _check_inside(path: Path, roots: list[Path]) -> None:
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ConvertError(
            f"{path}: cannot be copied ({getattr(error, 'strerror', None) or error}); download the whole "
            "pipeline"
        ) from None
    if not any(real.is_relative_to(root) for root in roots):
        raise ConvertError(
            f"{path}: is a link that leads out of the base, to {real}; links out of it are not followed: put "
            "the file there itself"
        )


def _plan_part(folder: Path, stem: str, roots: list[Path], plan: Copied) -> None:
    """Adds the files of a part, whose weights are to be called `stem`; "": it has none."""
    weights = _plan_weights(folder, stem, roots, plan) if stem else set()
    for path in _files(folder, roots, plan):
        place = str(path.relative_to(folder.parent))
        if path in weights or place in plan.texts:
            continue
        _check_inside(path, roots)
        known = path.suffix.lower() in _KINDS or path.name in _NAMES
        if (
            not known
            or ".safetensors.index" in path.name
            or path.name.startswith(".")
            or not stat.S_ISREG(path.stat().st_mode)
        ):
            plan.left_out.append(place)
        elif path.suffix == ".json" and (text := _without_code(path)):
            plan.texts[place] = text
        else:
            plan.files[place] = path


def _files(folder: Path, roots: list[Path], plan: Copied) -> Iterator[Path]:
    """What lies in a folder and the folders in it, by name; linked and hidden folders are left out."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            _check_inside(path, roots)
            if path.is_symlink() or path.name.startswith("."):
                plan.left_out.append(str(path.relative_to(folder.parent)))
            else:
                yield from _files(path, roots, plan)
        else:
            yield path


def _plan_weights(folder: Path, stem: str, roots: list[Path], plan: Copied) -> set[Path]:
    """Adds a part's weights under plain names; returns the files that this settles."""
    try:
        weights = weight_files(folder)
        for file in weights.files:
            _check_inside(file, roots)
            announced(file)  # cut short, or a page that says it is not there
    except WeightFileError as error:
        raise ConvertError(
            f"{error}; a part whose weights are not whole safetensors files is not copied: load it with its "
            "library and save it with save_pretrained(safe_serialization=True)"
        ) from None
    for file, name in weights.plain(stem).items():
        plan.files[f"{folder.name}/{name}"] = file
    if weights.index:
        plan.texts[f"{folder.name}/{stem}.safetensors.index.json"] = weights.plain_index(stem)
    return {*weights.files, *([weights.index] if weights.index else [])}


def _without_code(file: Path) -> str | None:
    """The file without fields that name code, if it has any.

    Raises:
        ConvertError: no JSON.
    """
    if file.name not in (
        "config.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "generation_config.json",
    ):
        return None
    value = read_json(file)
    kept = _passive(value)
    return None if kept == value else json.dumps(kept, indent=2) + "\n"


def _passive(value: object) -> object:
    if isinstance(value, dict):
        return {key: _passive(inner) for key, inner in value.items() if key not in _CODE}
    return [_passive(inner) for inner in value] if isinstance(value, list) else value


def copy(plan: Copied, target: Path) -> None:
    """Writes the copy.

    Raises:
        ConvertError: there is no room for it.
    """
    needed, free = sum(file.stat().st_size for file in plan.files.values()), shutil.disk_usage(target).free
    if needed > free:
        raise ConvertError(
            f"{target}: the other parts of the pipeline have {needed} bytes, and {free} are free; free disk "
            "space"
        )
    for place, file in plan.files.items():
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(file, target / place)
        except OSError as error:
            raise ConvertError(
                f"{file}: cannot be copied ({error.strerror or error}); download the whole pipeline"
            ) from None
    for place, text in plan.texts.items():
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        store.write_atomically(target / place, text)
