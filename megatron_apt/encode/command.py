"""From videos, pictures and captions to latent shards."""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from megatron_apt.data.encoding import TOKENIZER
from megatron_apt.encode.config import EncodeConfig
from megatron_apt.encode.decode import Clip
from megatron_apt.encode.each import decode_all
from megatron_apt.encode.manifest import Entry, read_entries
from megatron_apt.encode.notes import Notes
from megatron_apt.encode.rejected import RejectedInput
from megatron_apt.encode.shard_writer import (
    EncodeStopped,
    OpenShard,
    ShardWriter,
    finished_dataset,
    output_named,
)
from megatron_apt.encoders.codec import PixelCodec, PixelCodecConfig, VaeCodec
from megatron_apt.encoders.image import ClipImageEncoder, has_image_encoder
from megatron_apt.encoders.load import open_text_encoder, vae_codecs
from megatron_apt.encoders.text import BuiltinTextEncoder, TextEncoder, train_sentencepiece
from megatron_apt.errors import shown
from megatron_apt.lock import FolderLock

PIXEL_BYTES = 256 << 20  # decoded pixels held at once, in float32
TEXT_BATCH = 32
KINDS_TOLD = 8  # kinds of notes that are printed at the end


def encode(config: EncodeConfig, progress: bool = True) -> dict:
    """Encodes a dataset, or continues one, and returns the contents of its dataset.json.

    Unusable inputs are listed in rejected.jsonl (file, field, value, remedy) and skipped;
    what is worth knowing of the others is in notes.jsonl.

    Raises:
        ValueError, FileNotFoundError: settings that do not fit each other, the source or
            the output folder.
        EncodeStopped: more than max_rejected of the inputs unusable, no usable input, or
            an output that cannot be written.
        KeyboardInterrupt: with a message that says where to go on.
    """
    try:
        return _encode(config, progress)
    except KeyboardInterrupt:
        again = "finished shards are kept, the same command goes on behind them"
        raise KeyboardInterrupt(f"{shown(config.output)}: encoding was interrupted; {again}") from None


def _encode(config: EncodeConfig, progress: bool) -> dict:
    console = Console(soft_wrap=True, quiet=not progress)
    listing = read_entries(config.source, config.output)
    entries = listing.entries
    if listing.left.kinds:
        console.print(
            f"{shown(config.source)}: not encoded: {listing.left.described()}", highlight=False, markup=False
        )
    codec = _codec(config)
    codec.latent_shape(config.frames, config.height, config.width)
    settings = _settings(config, entries)
    info = finished_dataset(Path(config.output), settings)
    if info is not None:
        return info
    left = (
        [{"file": shown(config.source), "note": f"not encoded: {listing.left.described()}"}]
        if listing.left.kinds
        else []
    )
    with FolderLock(config.output, "encoding") as lock:
        info, notes = _write(
            config, ShardWriter(config.output, settings, lock), entries, codec, left, progress
        )
    told = f", {len(notes)} notes in notes.jsonl" if notes else ""
    console.print(
        f"{shown(config.output)}: {info['samples']} samples, {info['rejected']} rejected{told}",
        highlight=False,
        markup=False,
    )
    for note, count in Counter(note["note"] for note in notes[len(left) :]).most_common(KINDS_TOLD):
        console.print(f"  {count} x {note}", highlight=False, markup=False)
    return info


def _write(
    config: EncodeConfig, writer: ShardWriter, entries: list[Entry], codec, left: list[dict], progress: bool
) -> tuple[dict, list[dict]]:
    """The contents of dataset.json and the notes; `left` are notes of the source as a whole."""
    if writer.finished is not None:  # by another process, meanwhile
        return writer.finished, []
    bad = [entry.problem.as_dict() for entry in entries if entry.problem]
    _stop_if_too_many(config, writer, bad, len(entries))
    _stop_if_none(config, writer, bad, len(entries) - len(bad), len(entries))
    text_encoder = _text_encoder(config, writer, entries)
    image_encoder = _image_encoder(config)
    with torch.inference_mode():
        shards = _write_shards(config, writer, entries, codec, text_encoder, image_encoder, progress)
        conditions = _conditions(config, text_encoder)
    text_config = text_encoder.config_dict()
    if "tokenizer" in text_config:
        text_config["tokenizer"] = TOKENIZER  # relative, so that the folder can be moved
    first_frame = _first_frame(codec, image_encoder) if config.image_to_video else None
    return writer.finish(shards, codec.config_dict(), text_config, conditions, first_frame, left)


def _conditions(config: EncodeConfig, text_encoder: TextEncoder) -> dict[str, Tensor]:
    """The contents of conditions.safetensors."""
    conditions = {}
    for name, prompt in (("null", ""), ("negative", config.negative_prompt)):
        (conditions[name],), pooled = text_encoder.encode_pooled([prompt])
        if pooled is not None:
            conditions[f"{name}_pooled"] = pooled
    return conditions


def _settings(config: EncodeConfig, entries: Sequence[Entry]) -> dict:
    """Everything the dataset's bytes depend on."""
    settings = dataclasses.asdict(config)
    for free in ("output", "max_rejected", "device"):
        del settings[free]
    pixels = ("hdr", "interlaced", "background", "most_pixels")
    for added in (*pixels, "codec_tiling", "text_tokenizer", "text_dtype", "image_to_video", "image_encoder"):
        if settings[added] == getattr(EncodeConfig, added):
            del settings[added]  # so that folders begun before there was this field continue
    if config.tokenizer:
        settings["tokenizer"] = f"sha256 {hashlib.sha256(_tokenizer_bytes(config)).hexdigest()[:16]}"
    listing = hashlib.sha256()
    settings["source"] = shown(config.source)
    for entry in entries:
        listing.update(
            json.dumps([str(entry.path), entry.size, entry.caption, entry.start, entry.fps]).encode() + b"\n"
        )
    settings["entries"] = f"{len(entries)} files, sha256 {listing.hexdigest()[:16]}"
    return settings


def _codec(config: EncodeConfig) -> PixelCodec | VaeCodec:
    if config.codec in vae_codecs():
        return vae_codecs()[config.codec](
            str(Path(config.codec_path).resolve()), config.device, tiling=config.codec_tiling
        )
    return PixelCodec(
        PixelCodecConfig(
            channels=config.pixel_channels,
            temporal=config.pixel_temporal,
            causal=config.pixel_causal,
            spatial=config.pixel_spatial,
            shift=config.pixel_shift,
            scale=config.pixel_scale,
        )
    )


def _text_encoder(config: EncodeConfig, writer: ShardWriter, entries: Sequence[Entry]) -> TextEncoder:
    if config.text != "builtin":
        tokenizer = str(Path(config.text_tokenizer).resolve()) if config.text_tokenizer else ""
        return open_text_encoder(
            str(Path(config.text).resolve()), tokenizer, config.device, config.text_dtype
        )
    file = writer.folder / TOKENIZER
    if config.tokenizer:
        writer.commit(TOKENIZER, _tokenizer_bytes(config))
    elif not file.is_file():
        with output_named(writer.folder):
            train_sentencepiece(
                [entry.caption for entry in entries] + [config.negative_prompt], file, config.vocab_size
            )
    return BuiltinTextEncoder(file, config.text_width)


def _image_encoder(config: EncodeConfig) -> ClipImageEncoder | None:
    folder = config.image_encoder or (
        config.text if config.image_to_video and has_image_encoder(config.text) else ""
    )
    return ClipImageEncoder(str(Path(folder).resolve()), config.device) if folder else None


def _first_frame(codec: VaeCodec, image_encoder: ClipImageEncoder | None) -> dict:
    """What dataset.json says of the first frames."""
    described: dict = {"channels": codec.given_channels}
    return (
        described
        if image_encoder is None
        else described | {"image": list(image_encoder.shape), "image_encoder": image_encoder.config_dict()}
    )


def _tokenizer_bytes(config: EncodeConfig) -> bytes:
    if not Path(config.tokenizer).is_file():
        raise FileNotFoundError(
            f"tokenizer={config.tokenizer!r} does not exist; give a sentencepiece model, or leave it empty "
            "to train one"
        )
    return Path(config.tokenizer).read_bytes()


def _write_shards(
    config: EncodeConfig,
    writer: ShardWriter,
    entries: list[Entry],
    codec,
    text_encoder,
    image_encoder,
    progress: bool,
) -> int:
    """Writes the shards that are not there yet; returns how many the dataset has."""
    size = config.samples_per_shard
    shards = math.ceil(len(entries) / size)
    console = Console()
    columns = (
        TextColumn("encode"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    rejected: list[dict] = []
    accepted = 0
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("encode", total=len(entries))
        for number in range(shards):
            members = range(number * size, min((number + 1) * size, len(entries)))
            done = writer.done(number)
            if done is None:
                with writer.shard(number) as shard:
                    for part in _parts(config, members):
                        _encode_part(
                            config, shard, [(i, entries[i]) for i in part], codec, text_encoder, image_encoder
                        )
                        _stop_if_too_many(config, writer, rejected + shard.rejected, len(entries))
                        bar.advance(task, len(part))
                done = shard.done
            else:
                bar.advance(task, len(members))
            rejected += done["rejected"]
            accepted += len(done["index"])
            _stop_if_too_many(config, writer, rejected, len(entries))
    _stop_if_none(config, writer, rejected, accepted, len(entries))
    return shards


def _parts(config: EncodeConfig, members: range) -> list[range]:
    """Members cut so that the pixels of one part fit PIXEL_BYTES."""
    step = min(256, max(1, PIXEL_BYTES // (12 * config.frames * config.height * config.width)))
    return [members[i : i + step] for i in range(0, len(members), step)]


def _encode_part(
    config: EncodeConfig,
    shard: OpenShard,
    members: list[tuple[int, Entry]],
    codec,
    text_encoder,
    image_encoder,
) -> None:
    usable = [entry for _, entry in members if entry.problem is None]
    notes = Notes()
    decoded = iter(
        decode_all(
            [_clip(config, entry) for entry in usable], "gpu" if config.device == "cuda" else "cpu", notes
        )
    )
    texts = _encode_texts(sorted({entry.caption for entry in usable}), text_encoder)
    for i, entry in members:
        pixels = entry.problem or next(decoded)
        arrays = (
            {} if isinstance(pixels, RejectedInput) else _encode_pixels(config, pixels, codec, image_encoder)
        )
        if not all(array.isfinite().all() for array in arrays.values()):
            pixels = RejectedInput(
                entry.path,
                "latent",
                "not finite",
                "the codec overflows on this file; remove it or run the codec in float32",
            )
        if isinstance(pixels, RejectedInput):
            shard.reject(pixels)
            continue
        if entry.note:
            notes.add(entry.path, entry.note)
        clip = _clip(config, entry)
        meta = {
            "source": shown(entry.path),
            "size": [clip.frames, clip.height, clip.width],
            "start": clip.start,
            "fps": clip.fps,
            "stride": clip.stride,
        }
        text, pooled = texts[entry.caption]
        shard.add(f"{i:08d}", arrays.pop("latent"), text, entry.caption, meta, pooled=pooled, **arrays)
    shard.notes += notes.lines()


def _encode_pixels(
    config: EncodeConfig, pixels: Tensor, codec, image_encoder: ClipImageEncoder | None
) -> dict[str, Tensor]:
    """The arrays of a clip (3, F, H, W): its latent, and what is kept of its first frame."""
    arrays = {"latent": codec.encode(pixels)}
    if config.image_to_video:
        arrays["given"] = codec.given(pixels[:, :1], config.frames)
        if image_encoder is not None:
            arrays["image"] = image_encoder.encode(pixels[:, :1])
    return arrays


def _clip(config: EncodeConfig, entry: Entry) -> Clip:
    start = config.start if entry.start < 0 else entry.start
    fps = config.fps if entry.fps < 0 else entry.fps
    return Clip(
        entry.path,
        config.height,
        config.width,
        config.frames,
        config.stride,
        fps,
        start,
        config.allow_upscale,
        config.policy(),
    )


def _encode_texts(captions: list[str], text_encoder: TextEncoder) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Rows of each caption, and its pooled vector if the encoder has one."""
    texts: dict[str, tuple[Tensor, Tensor | None]] = {}
    for i in range(0, len(captions), TEXT_BATCH):
        batch = captions[i : i + TEXT_BATCH]
        rows, pooled = text_encoder.encode_pooled(batch)
        texts.update(
            zip(batch, zip(rows, [None] * len(batch) if pooled is None else pooled, strict=True), strict=True)
        )
    return texts


def _stop_if_too_many(config: EncodeConfig, writer: ShardWriter, rejected: list[dict], total: int) -> None:
    if len(rejected) <= config.max_rejected * total:
        return
    raise EncodeStopped(
        f"{shown(config.source)}: {len(rejected)} of {total} inputs are unusable, more than "
        f"max_rejected={config.max_rejected:g}; {_first_of(writer, rejected)}; mend them or raise "
        "max_rejected"
    )


def _stop_if_none(
    config: EncodeConfig, writer: ShardWriter, rejected: list[dict], accepted: int, total: int
) -> None:
    if accepted == 0:
        raise EncodeStopped(
            f"{shown(config.source)}: none of {total} inputs is usable; {_first_of(writer, rejected)}"
        )


def _first_of(writer: ShardWriter, rejected: list[dict]) -> str:
    """Writes rejected.jsonl and says what stands first in it."""
    writer.write_rejected(rejected)
    return (
        "the first is {file}: {field}={value}: {remedy}. ".format(**rejected[0])
        + f"All are in {shown(writer.folder)}/rejected.jsonl"
    )
