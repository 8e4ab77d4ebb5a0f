"""Models and tokenizers of diffusers and transformers, from folders of elsewhere of which
the libraries see only what was checked.

Both libraries act on what lies beside the weights: pickles, adapters, code of the
folder's own (auto_map), kernels to download (attn_implementation), paths of further
files. They are therefore given a temporary folder: links to safetensors files under plain
names, whatever variant they are of, and JSON without such fields. What a config.json asks
for is compared with what the files hold before anything is allocated.
"""

import json
import re
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch

from megatron_apt import schema
from megatron_apt.convert.foreign import kind_of
from megatron_apt.encoders.weight_files import (
    Announced,
    WeightFileError,
    Weights,
    announced,
    open_regular,
    printable,
    read_settings,
    weight_files,
)

# Fields of JSON files by which the libraries would run, fetch or open something else.
_ACTIVE = re.compile(
    r"auto_map|custom_pipelines?|trust_remote_code|chat_template|.*attn_implementation.*|.*experts_implementation|use_kernels|kernel_config|"
    r".*_file|(base_model_)?[tpe]p_plan|_name_or_path|_commit_hash|name_or_path"
)
_LOOPS = re.compile(r"layers|blocks|depth")  # in names of fields that say how often something is built
_PER_BLOCK = ("layers_per_block", "num_res_blocks")  # built once for each entry of the longest of these lists
_BLOCK_LISTS = re.compile(r"block_|mult|channels")
_NEEDED = ("num_layers", "num_hidden_layers", "layers_per_block", "num_res_blocks")
_COUNTS = re.compile(r"(^|_)num_")  # in those of other counts, by which lists are made
_NUMBER = re.compile(r"\d+")
_MOST = 1024  # of anything counted or built again and again
_FLOATS = ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")  # whole numbers are positions, and the like
TOKENIZER_LINKS = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
TOKENIZER_JSON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


_Some = Annotated[int, msgspec.Meta(ge=1, le=2**16)]


class _Settings(msgspec.Struct):
    """What a dataset says of its codec and encoders, each of which has some of these."""

    path: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    tokenizer_path: str = ""
    tokenizer: str = ""
    max_length: _Some = 1
    width: _Some = 1
    seed: int = 0
    position_scale: float = 0.0
    tiling: Annotated[int, msgspec.Meta(le=2**16)] = 0
    temporal: Annotated[int, msgspec.Meta(le=256)] = 1
    spatial: Annotated[int, msgspec.Meta(le=256)] = 1
    channels: int = 3
    causal: bool = True
    shift: float = 0.0
    scale: float = 1.0


def checked_settings(config: dict, what: str) -> tuple[object, dict]:
    """The kind that a codec's or encoder's settings name, and the others.

    Args:
        what: of messages.

    Raises:
        ValueError: one of another type or range; names it.
    """
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in config.items()}
    kind = settings.pop("kind", None)
    schema.convert(
        settings,
        _Settings,
        f"{what} {printable(str(kind))}",
        remedy="encode the dataset again, or correct its dataset.json",
    )
    return kind, settings


def read_object(file: Path) -> dict:
    """The object in a JSON file that is there.

    Raises:
        ValueError: none in it.
    """
    return read_settings(file)


def checked_model_folder(path: str | Path, expected: str) -> Path:
    """The folder, if it holds a config.json of the expected class and safetensors
    weights.

    Raises:
        FileNotFoundError, ValueError: naming what is missing and where it should be.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}/config.json does not exist; give a local folder with an {expected} saved by "
            "save_pretrained"
        )
    config = read_object(folder / "config.json")
    architectures = config.get("architectures")
    names = (
        config.get("_class_name"),
        config.get("model_type"),
        *(architectures if isinstance(architectures, list) else ()),
    )
    if expected not in names:
        raise ValueError(f"{folder}/config.json: holds {[n for n in names if n]}, not {expected}")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder}: no *.safetensors file; pickled weights are not read, convert them with "
            "save_pretrained(safe_serialization=True)"
        )
    return folder


def load_frozen(model_class: Any, folder: Path, device: str, **dtype: torch.dtype) -> Any:
    """A model of diffusers or transformers with every weight from the folder; both
    libraries only warn of those they make up.

    Raises:
        ValueError: weights that are damaged, missing, quantised, or of another shape than
            config.json asks for.
    """
    weights = weight_files(folder)
    held = _held(weights)
    failure = f"{folder}: {model_class.__name__} cannot be read"
    with model_folder(model_class, folder, weights) as staged, _explained(failure, staged, folder):
        _bound(model_class, staged, read_object(staged / "config.json"), held)
        options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        model, info = model_class.from_pretrained(staged, **options, **dtype)
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{folder}: the weights of {model_class.__name__} lack {missing[0]}{more}; download them again"
        )
    known = {_NUMBER.sub("#", name) for name in model.state_dict()}
    if beyond := sorted(name for name in info["unexpected_keys"] if _NUMBER.sub("#", name) in known):
        raise ValueError(
            f"{folder}/config.json: asks for fewer layers than there are: the weights have "
            f"{printable(beyond[0])} too; download it again"
        )
    return model.to(device).eval().requires_grad_(False)


@contextmanager
def model_folder(model_class: type, folder: Path, weights: Weights) -> Generator[Path]:
    """A folder in which the library finds the weights under plain names, and a
    config.json that makes it do nothing else.
    """
    stem = "diffusion_pytorch_model" if model_class.__module__.startswith("diffusers.") else "model"
    with _staged(folder, (), ("config.json",)) as staged:
        for file, name in weights.plain(stem).items():
            (staged / name).symlink_to(file.resolve())
        if weights.index:
            (staged / f"{stem}.safetensors.index.json").write_text(
                weights.plain_index(stem), encoding="utf-8"
            )
        yield staged


def read_pretrained(kind: Any, folder: Path, links: Iterable[str], objects: Iterable[str], what: str):
    """What a library makes of these files of a folder, if they are there: a tokenizer, or
    a preparation of pictures.

    Args:
        links: files that are read as they are.
        objects: files with a JSON object, which is read without what the libraries would
            act on.
        what: for messages.

    Raises:
        ValueError: nothing.
    """
    with (
        _staged(folder, links, objects) as staged,
        _explained(f"{folder}: the {what} cannot be read", staged, folder),
    ):
        return kind.from_pretrained(staged, local_files_only=True)


@contextmanager
def _staged(folder: Path, links: Iterable[str], objects: Iterable[str]) -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="megatron-apt-") as name:
        staged = Path(name)
        for file in links:
            if (folder / file).exists():
                open_regular(folder / file).close()
                (staged / file).symlink_to((folder / file).resolve())
        for file in objects:
            if (folder / file).exists():
                (staged / file).write_text(json.dumps(_passive(read_object(folder / file))), encoding="utf-8")
        yield staged


def _passive(value: object) -> object:
    """JSON without fields that a library acts on."""
    if isinstance(value, dict):
        return {key: _passive(inner) for key, inner in value.items() if not _ACTIVE.fullmatch(key)}
    return [_passive(inner) for inner in value] if isinstance(value, list) else value


@contextmanager
def _explained(failure: str, staged: Path, folder: Path) -> Generator[None]:
    """Whatever a library raises over a file, as one message; tokenizers' panics are no Exception even."""
    with explained(failure, str(staged), str(folder)):
        yield


@contextmanager
def explained(
    failure: str, place: str = "", called: str = "", remedy: str = "download it again"
) -> Generator[None]:
    """Whatever a library raises, as one message; a `place` in it is `called` otherwise.

    Raises:
        ValueError: nothing else but an interruption, or too little memory.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        said = " ".join((str(error).replace(place, called) if place else str(error)).split())
        raise ValueError(f"{failure} ({type(error).__name__}: {said[:500]}); {remedy}") from error


def _held(weights: Weights) -> dict[str, Announced]:
    """The tensors of the files.

    Raises:
        WeightFileError: they are quantised, or an adapter.
    """
    held: dict[str, Announced] = {}
    for file in weights.files:
        found = announced(file)
        if twice := found.keys() & held.keys():
            raise WeightFileError(
                f"{file}: {printable(min(twice))} is in another file of its index too; download both again"
            )
        if wrong := next((name for name, tensor in found.items() if tensor.dtype not in _FLOATS), None):
            raise WeightFileError(
                f"{file}: {printable(wrong)} has dtype {printable(found[wrong].dtype)}: the weights are "
                "quantised; take those in bf16, fp16 or fp32"
            )
        held |= found
    if kind := kind_of(held):
        raise WeightFileError(f"{weights.files[0].parent}: cannot be read as it is; {kind}")
    return held


def _bound(model_class: Any, staged: Path, config: dict, held: dict[str, Announced]) -> None:
    """Compares what config.json asks for with what the files hold, on a model without
    memory.

    Raises:
        ValueError: it asks for more; or whatever the library raises over it.
    """
    if "quantization_config" in config:
        raise ValueError("config.json has a quantization_config; take weights in bf16, fp16 or fp32")
    _bound_counts(config, len(held))
    numbers = sum(tensor.numbers for tensor in held.values())
    with torch.device("meta"):
        if hasattr(model_class, "from_config"):  # diffusers
            model = model_class.from_config(config)
        else:
            model = model_class(model_class.config_class.from_pretrained(staged, local_files_only=True))
    asked = sum(p.numel() for p in model.parameters())
    if asked > 2 * numbers + 2**20:  # a few that are missing are named later
        raise ValueError(
            f"config.json asks for {asked} numbers, and the files hold {numbers}: they do not belong together"
        )


def _bound_counts(config: dict, tensors: int, where: str = "") -> None:
    """Raises ValueError for a count that would keep a loop busy for ever."""
    longest = max(
        (len(value) for key, value in config.items() if isinstance(value, list) and _BLOCK_LISTS.search(key)),
        default=1,
    )
    for key, value in config.items():
        if isinstance(value, dict):
            _bound_counts(value, tensors, f"{where}{key}.")
            continue
        values = value if isinstance(value, list) else [value]
        if key in _NEEDED and isinstance(value, int) and value < 1:
            raise ValueError(f"config.json: {where}{key}={value}: must be at least 1")
        most = min(tensors, _MOST) if _LOOPS.search(key) else _MOST if _COUNTS.search(key) else None
        largest = max((v for v in values if isinstance(v, int)), default=0) * (
            longest if key in _PER_BLOCK else 1
        )
        if len(values) > max(_MOST, tensors) or (most is not None and largest > max(most, 16)):
            shown = printable(repr(value)) if largest < 2**64 else "a number of many digits"
            raise ValueError(
                f"config.json: {where}{printable(key)}={shown}, and the files hold {tensors} tensors: they "
                "do not belong together"
            )
