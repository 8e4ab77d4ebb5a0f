"""Tensors of a Hugging Face checkpoint, one at a time: a folder in diffusers' layout or one .safetensors file. Never a pickle."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_apt.convert.weights import Mapped

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Tensors that published checkpoints hold and diffusers' class leaves unread (its _keys_to_ignore_on_load_unexpected).
_UNREAD = {"WanTransformer3DModel": re.compile(r"blocks\.\d+\.attn2\.norm_added_q\.weight")}
# Tensors that the authors of Wan, Stable Diffusion 3 and HunyuanVideo call so, and diffusers otherwise.
_ORIGINAL = {"head.modulation", "x_embedder.proj.weight", "joint_blocks.0.x_block.attn.qkv.weight", "img_in.proj.weight"}


class ConvertError(ValueError):
    """A checkpoint that cannot be converted; names the file, the tensor and the remedy."""


@dataclass(frozen=True)
class Entry:
    """One tensor as its file announces it."""

    file: Path
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """A Hugging Face checkpoint."""

    path: Path
    config: dict
    entries: dict[str, Entry]

    def read(self, name: str) -> Tensor:
        """One tensor. It is a view of the mapped file, which is let go with it."""
        entry = self.entries[name]
        with _opened(entry.file) as file:
            return file.get_tensor(name)

    def check(self, tensors: list[Mapped]) -> None:
        """Compares the tensors that are there with those that are needed.

        Raises:
            ConvertError: one is missing, superfluous, of another shape, or not of floating point.
        """
        needed = {name: shape for mapped in tensors for name, shape in mapped.theirs.items()}
        missing, extra = sorted(needed.keys() - self.entries.keys()), sorted(self.entries.keys() - needed.keys())
        if missing or extra:
            parts = [f"{what} {_some(names)}" for what, names in (("lacks", missing), ("has unknown", extra)) if names]
            reason = "config.json describes another model, or the checkpoint is not whole"
            if _ORIGINAL.intersection(name.removeprefix("model.diffusion_model.") for name in extra):
                reason = f"it has its authors' names, not diffusers': {rewrite(self.config.get('_class_name'))}"
            raise ConvertError(f"{self.path}: {' and '.join(parts)}; {reason}")
        for name, shape in needed.items():
            entry = self.entries[name]
            if entry.shape != shape:
                raise ConvertError(
                    f"{entry.file}: {name} has shape {tuple(entry.shape)}, config.json asks for {tuple(shape)}; they do not belong together"
                )


def open_source(path: str | Path, subfolder: str = "", config: str = "") -> Source:
    """A checkpoint from a user's path.

    Args:
        path: a transformer's folder (config.json, *.safetensors, an index where there are several), a pipeline's folder, or one .safetensors file.
        subfolder: of a pipeline's folder; empty: `transformer`.
        config: config.json of a file that has none beside it.

    Raises:
        ConvertError: nothing there, only pickles, a file that is missing, cut short or of another format, or a dtype that is no floating point.
    """
    path = Path(path)
    if not path.exists():
        raise ConvertError(f"{path} does not exist; give a local folder or .safetensors file (nothing is downloaded)")
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and (subfolder or (path / "transformer").is_dir()):
        folder = path = path / (subfolder or "transformer")
    settings = read_json(Path(config) if config else folder / "config.json")
    files = [path] if path.is_file() else _listed(folder)
    entries: dict[str, Entry] = {}
    for file in files:
        found = _announced(file)
        if twice := sorted(found.keys() & entries.keys()):
            raise ConvertError(f"{file}: {twice[0]} is also in {entries[twice[0]].file.name}; remove one of the files")
        entries |= found
    unread = _UNREAD.get(str(settings.get("_class_name")))
    return Source(path, settings, {name: entry for name, entry in entries.items() if unread is None or not unread.fullmatch(name)})


def _listed(folder: Path) -> list[Path]:
    """The weight files of a folder, by its index if it has one."""
    indices = sorted(folder.glob("*.safetensors.index*.json"))  # with the variant in its name, if it is one
    if len(indices) > 1:
        raise ConvertError(f"{folder}: several indices ({', '.join(i.name for i in indices)}); leave one")
    if not indices:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) == 1:
            return files
        if files:
            raise ConvertError(f"{folder}: {len(files)} .safetensors files and no index; give the one you mean")
        pickles = sorted(p.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(suffix))
        reason = f"only {pickles[0]}, a pickle, which could run code: save it as safetensors first" if pickles else "no .safetensors file"
        raise ConvertError(f"{folder}: {reason}")
    weights = read_json(indices[0]).get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(place, str) for place in weights.values()):
        raise ConvertError(f"{indices[0]}: has no weight_map; download it again")
    names = sorted(set(weights.values()))
    if outside := [name for name in names if name in ("", "..") or Path(name).name != name]:  # a file may be a link, as in a hub's cache
        raise ConvertError(f"{indices[0]}: names {outside[0]!r} outside its folder; download it again")
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            lost = next(name for name, place in weights.items() if place == file.name)
            raise ConvertError(f"{indices[0]}: names {file.name} (for {lost}), which is not there; download it")
    for file in files:
        held = _announced(file)
        if wrong := [name for name, place in weights.items() if place == file.name and name not in held]:
            raise ConvertError(f"{file}: lacks {wrong[0]}, which {indices[0].name} says it holds; download both again")
    return files


def _announced(file: Path) -> dict[str, Entry]:
    with _opened(file) as opened:
        entries = {}
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            part = opened.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise ConvertError(f"{file}: {name} has dtype {part.get_dtype()}; weights are {', '.join(DTYPES)} (quantised ones must be expanded)")
            entries[name] = Entry(file, torch.Size(part.get_shape()), DTYPES[part.get_dtype()])
        return entries


def _opened(file: Path):
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ConvertError(f"{file}: is no whole safetensors file ({error}); it was cut short or is of another format: download it again") from None


def read_json(file: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ConvertError: not there, or none in it.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConvertError(f"{file} does not exist; a checkpoint needs its config.json, or give another with --config") from None
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{file}: is not JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ConvertError(f"{file}: is not a JSON object; download it again")
    return value


def rewrite(architecture: str) -> str:
    """What to do with a checkpoint under its authors' names."""
    return f"`diffusers.{architecture}.from_single_file(FILE, config=FOLDER_OF_CONFIG_JSON).save_pretrained(FOLDER)` renames them"


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
