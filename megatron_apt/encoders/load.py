"""Codecs and text encoders of any family, from a folder or from what a dataset stores of them."""

import functools
from pathlib import Path
from typing import Any

from megatron_apt.encoders.codec import KlCodec, PixelCodec, PixelCodecConfig, VaeCodec
from megatron_apt.encoders.foreign_folder import checked_settings
from megatron_apt.encoders.pipelines import read_index
from megatron_apt.encoders.text import BuiltinTextEncoder, HuggingFaceTextEncoder, TextEncoder
from megatron_apt.families import registry


@functools.cache
def vae_codecs() -> dict[str, type[VaeCodec]]:
    """By kind: those of families, and the one of pictures that several share."""
    return {codec.kind: codec for codec in (*registry.parts("codec", "CODEC"), KlCodec)}


@functools.cache
def pipeline_encoders() -> dict[str, type[TextEncoder]]:
    """The text encoders of families' pipelines, by kind."""
    return {encoder.kind: encoder for encoder in registry.parts("text", "TEXT")}


def load_codec(config: dict, device: str = "cpu") -> PixelCodec | VaeCodec:
    """The codec whose config_dict() this is.

    Raises:
        ValueError: unknown kind or setting.
    """
    kind, settings = checked_settings(config, "codec")
    try:
        if kind == "pixel":
            if settings.pop("tiling", 0):
                raise ValueError(
                    "codec pixel has no tiles: its memory is that of the pixels; leave tiling at 0"
                )
            return PixelCodec(PixelCodecConfig(**settings))
        if isinstance(kind, str) and kind in vae_codecs():
            return vae_codecs()[kind](**settings, device=device)
    except TypeError as error:
        raise ValueError(f"codec {kind}: {error}; settings given: {settings}") from None
    raise ValueError(f"codec kind={kind!r} is unknown; use {', '.join(map(repr, ('pixel', *vae_codecs())))}")


def open_text_encoder(
    path: str | Path, tokenizer_path: str = "", device: str = "cpu", dtype: str = "float32"
) -> TextEncoder:
    """The encoder of a family's pipeline folder, or of a folder with a T5 or UMT5 encoder.

    Raises:
        FileNotFoundError, ValueError: naming what is missing, or a pipeline of another
            kind.
    """
    pipeline = _of_pipeline(Path(path))
    if pipeline is not None and pipeline.several_tokenizers and tokenizer_path:
        raise ValueError(
            f"text_tokenizer={tokenizer_path!r}: {path} is a pipeline with several tokenizers and uses its "
            "own; leave it empty"
        )
    kind = HuggingFaceTextEncoder.kind if pipeline is None else pipeline.kind
    config = {"kind": kind, "path": str(path), "dtype": dtype}
    return load_text_encoder(config | ({"tokenizer_path": tokenizer_path} if tokenizer_path else {}), device)


def _of_pipeline(folder: Path) -> type[TextEncoder] | None:
    """The encoder of a pipeline folder, None for one without model_index.json.

    Raises:
        ValueError: a pipeline of another kind.
    """
    if not (folder / "model_index.json").is_file():
        return None
    name = str(read_index(folder).get("_class_name") or "")
    for encoder in pipeline_encoders().values():
        if name.startswith(encoder.pipelines):
            return encoder
    starts = ", ".join(encoder.pipelines for encoder in pipeline_encoders().values())
    raise ValueError(
        f"{folder}/model_index.json: the text of {name or 'an unnamed pipeline'} cannot be encoded, only "
        f"that of pipelines whose class begins with {starts}; if its text encoder is a T5 or UMT5, give the "
        "folder of that"
    )


def load_text_encoder(config: dict, device: str = "cpu") -> TextEncoder:
    """The encoder whose config_dict() this is.

    Raises:
        ValueError: unknown kind or setting.
    """
    kind, settings = checked_settings(config, "text encoder")
    folders: dict[str, Any] = {HuggingFaceTextEncoder.kind: HuggingFaceTextEncoder} | pipeline_encoders()
    try:
        if kind == BuiltinTextEncoder.kind:
            return BuiltinTextEncoder(**settings)
        if isinstance(kind, str) and kind in folders:
            return folders[kind](**settings, device=device)
    except TypeError as error:
        raise ValueError(f"text encoder {kind}: {error}; settings given: {settings}") from None
    kinds = ", ".join(map(repr, (BuiltinTextEncoder.kind, *folders)))
    raise ValueError(f"text encoder kind={kind!r} is unknown; use {kinds}")
