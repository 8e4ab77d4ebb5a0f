"""From videos, pictures and captions to latent shards."""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
from megatron_apt.encode.decode import Clip
from megatron_apt.encode.each import decode_all
from megatron_apt.encode.manifest import Entry, read_entries
from megatron_apt.encode.notes import Notes
from megatron_apt.encode.policy import PixelPolicy
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
from megatron_apt.families import registry
from megatron_apt.lock import FolderLock

NEGATIVE_PROMPT = "blurry, distorted, low quality"
PIXEL_BYTES = 256 << 20  # decoded pixels held at once, in float32
TEXT_BATCH = 32
KINDS_TOLD = 8  # kinds of notes that are printed at the end


@dataclass(frozen=True)
class EncodeConfig:
    """Settings of `megatron-apt encode`."""

    source: str
    """Folder of pictures or videos, or a manifest (.jsonl or .csv) with columns path,
    caption and optionally start, fps.
    """
    output: str
    """Folder of the dataset. An interrupted encoding with the same settings continues there."""
    height: int = 256
    """Height of the bucket, in pixels."""
    width: int = 256
    """Width of the bucket, in pixels."""
    frames: int = 1
    """Frames of the bucket. With 1, pictures are accepted and videos give their first frame."""
    fps: float = 0.0
    """Frames per second to sample videos at; 0 keeps the source's frames and applies stride."""
    stride: int = 1
    """Take every stride-th frame, if fps is 0."""
    start: float = 0.0
    """Seconds to skip at the beginning of each video."""
    allow_upscale: bool = False
    """Accept pictures and videos smaller than the bucket."""
    hdr: Literal["tonemap", "reject", "warn"] = "tonemap"
    """HDR pictures and videos (PQ, HLG): tone-mapped to BT.709, rejected, or taken as
    they are with a note.
    """
    interlaced: Literal["deinterlace", "reject", "warn"] = "deinterlace"
    """Interlaced videos: deinterlaced, rejected, or left combed with a note."""
    background: str = "white"
    """What lies under transparent pixels: a colour's name, or #rrggbb."""
    most_pixels: int = 1 << 27
    """Largest picture that is decoded, in pixels (height x width), and four times the
    largest frame of a video; what is larger is rejected.
    """
    codec: str = "pixel"
    """"pixel" (built in, no weights), or the class of codec_path: "kl" (AutoencoderKL, of
    pictures), or that of a family: "wan" (AutoencoderKLWan), "hunyuan"
    (AutoencoderKLHunyuanVideo).
    """
    codec_path: str = ""
    """Local folder of the VAE, or of a diffusers pipeline with the VAE in vae/; safetensors only."""
    codec_tiling: int = 0
    """VAEs: side in pixels of the tiles that are encoded one after the other, which saves
    memory but changes latents a little; 0: whole.
    """
    pixel_channels: int = 3
    """Pixel codec: 3 for RGB, 1 for luma."""
    pixel_temporal: int = 4
    """Pixel codec: frames of one latent frame."""
    pixel_causal: bool = True
    """Pixel codec: the first frame stands alone (1 + k * temporal frames), as in video
    VAEs; off: whole groups only (k * temporal frames).
    """
    pixel_spatial: int = 1
    """Pixel codec: side of the pixel block of one latent position."""
    pixel_shift: float = 0.0
    """Pixel codec: mean pixel value of the data, in [-1, 1]."""
    pixel_scale: float = 1.0
    """Pixel codec: latents are divided by it."""
    text: str = "builtin"
    """"builtin" (needs no weights), or a local folder: a diffusers pipeline (Wan,
    HunyuanVideo, Stable Diffusion 3, Flux), for embeddings as its encode_prompt gives
    them; or a T5 or UMT5 encoder with its tokenizer.
    """
    text_tokenizer: str = ""
    """Folder of the tokenizer, if it is not in the Wan pipeline's tokenizer/ or beside
    the T5 or UMT5 encoder.
    """
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which text encoders of a folder run. Embeddings are kept in float32."""
    image_to_video: bool = False
    """Keep of each clip also what image-to-video models are given of its first frame
    (codec 'wan'): mask, latents, and the tokens of the image encoder where there is one.
    Wan2.2's TI2V needs none of it: it reads the first frame of the clip's own latents.
    """
    image_encoder: str = ""
    """Local folder of a pipeline with image_encoder/ and image_processor/ (Wan2.1 I2V;
    Wan2.2 has none); empty: the one given as text, if it has them.
    """
    tokenizer: str = ""
    """Built-in text encoder: an existing sentencepiece model; empty trains one on the captions."""
    text_width: int = 64
    """Built-in text encoder: width of the embeddings."""
    vocab_size: int = 1024
    """Built-in text encoder: largest vocabulary to train."""
    negative_prompt: str = NEGATIVE_PROMPT
    """The fixed negative prompt that consistency distillation folds into its guidance."""
    samples_per_shard: int = 1000
    """Inputs per tar file."""
    max_rejected: float = 0.1
    """Stop when more than this share of the inputs is unusable."""
    device: str = "cpu"
    """"cpu" or "cuda": where codec and text encoder run. Decoding follows it."""

    def __post_init__(self):
        for field in ("height", "width", "frames", "stride", "samples_per_shard"):
            _check(getattr(self, field) >= 1, field, getattr(self, field), "must be at least 1")
        for field in ("fps", "start"):
            _check(
                math.isfinite(getattr(self, field)) and getattr(self, field) >= 0,
                field,
                getattr(self, field),
                "must be a number >= 0",
            )
        _policy(self)
        _check(
            0 <= self.max_rejected <= 1,
            "max_rejected",
            self.max_rejected,
            "is a share; use a number from 0 to 1",
        )
        giving = registry.codecs_of(kind for kind in registry.FAMILIES.values() if kind.given_channels)
        _check(
            self.codec in ("pixel", *vae_codecs()),
            "codec",
            self.codec,
            f"use {', '.join(map(repr, ('pixel', *vae_codecs())))}",
        )
        _check(
            self.codec == "pixel" or bool(self.codec_path),
            "codec_path",
            self.codec_path,
            f"codec={self.codec!r} needs a local folder",
        )
        _check(
            self.codec != "pixel" or not self.codec_tiling,
            "codec_tiling",
            self.codec_tiling,
            "applies to VAEs; leave it 0 with codec='pixel'",
        )
        _check(
            not self.image_to_video or self.codec in giving,
            "image_to_video",
            self.image_to_video,
            f"needs codec={' or '.join(map(repr, giving))}, not {self.codec!r}",
        )
        _check(
            not self.image_to_video or self.frames > 1,
            "frames",
            self.frames,
            "with image_to_video the first is given; encode clips of several",
        )
        _check(
            self.image_to_video or not self.image_encoder,
            "image_encoder",
            self.image_encoder,
            "applies with image_to_video; turn that on",
        )
        _check(
            self.text != "builtin" or not self.text_tokenizer,
            "text_tokenizer",
            self.text_tokenizer,
            "text='builtin' has its own: use tokenizer",
        )
        _check(
            self.fps == 0 or self.stride == 1,
            "stride",
            self.stride,
            f"applies only with fps=0, but fps={self.fps:g}; leave one of them out",
        )
        _check(self.device in ("cpu", "cuda"), "device", self.device, "use 'cpu' or 'cuda'")


def _check(good: bool, field: str, value: object, remedy: str) -> None:
    if not good:
        raise ValueError(f"{field}={value!r}: {remedy}")


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
        _policy(config),
    )


def _policy(config: EncodeConfig) -> PixelPolicy:
    return PixelPolicy(config.hdr, config.interlaced, config.background, config.most_pixels)


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
