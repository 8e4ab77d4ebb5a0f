"""Samples from a checkpoint: loads the generator with the codec and text encoder of the
data it was trained on.
"""

import itertools
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_apt.checkpoint import store
from megatron_apt.checkpoint.fits import check_model
from megatron_apt.checkpoint.state import configuration_of
from megatron_apt.config import ParallelConfig
from megatron_apt.data.batches import check_first_frames, first_frames
from megatron_apt.data.encoding import KEPT, Encoding, KeptEncoding
from megatron_apt.data.shards import FirstFrame, LatentShards
from megatron_apt.errors import check_input_file, check_output_folder
from megatron_apt.families.registry import build_backbone
from megatron_apt.models.backbone import Backbone
from megatron_apt.models.condition import Condition
from megatron_apt.models.config import Fp8Config, ModelConfig
from megatron_apt.parallel import startup
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.sample import media
from megatron_apt.sample.config import MOST_SIDE, SampleConfig
from megatron_apt.sample.sampler import Sampler, sample_noise
from megatron_apt.training.networks import load_weights

DEFAULT_FPS = 8.0
# Bytes of a prompt in a file's name: the limit is 255 for all of it, and temporary names
# are longer
MOST_NAME = 80


@dataclass(frozen=True)
class Loaded:
    """A generator ready to sample.

    Attributes:
        model: the network, in evaluation of one checkpoint's weights.
        text_length: padding its captions were trained with.
        shards: where the first encoded dataset of its run lies, or did.
        kept: where the run has kept what made its latents.
        two_step_t: where the two-step procedure returns to noise.
        one_step: whether it was trained to map noise to samples in one step.
    """

    model: Backbone
    text_length: int
    shards: tuple[str, ...]
    kept: Path
    two_step_t: float
    one_step: bool


def load_generator(checkpoint: str, mesh: Mesh, weights: str = "ema") -> Loaded:
    """The generator of a run folder or iteration-* folder.

    Raises:
        CheckpointError: nothing there, or it has no such weights.
    """
    folder = store.resolve(checkpoint)
    state = store.read_state(folder)
    if weights == "ema" and not state["ema"]:
        raise store.CheckpointError(
            f"{checkpoint}: was trained without EMA (optimizer.ema=0); use --weights raw"
        )
    run = configuration_of(state["config"])
    shape = replace(run.model, fp8=Fp8Config())  # sampling is done in the dtype of the weights
    check_model(store.Stored(folder), shape, run.of_method.sampled, mesh)
    model = build_backbone(shape, mesh).to(mesh.device)
    load_weights(f"{checkpoint}:{weights}", model, mesh)
    return Loaded(
        model.eval().requires_grad_(False),
        run.data.text_length or 0,
        _places(run.data.shards, state.get("data")),
        folder.parent.parent / KEPT,
        run.of_method.two_step_time(run),
        run.of_method.one_step,
    )


def _places(shards: tuple[str, ...], identities: Any) -> tuple[str, ...]:
    """Where a run's first dataset may lie: as its recipe says, seen from here, and where it
    was when the run was trained.
    """
    found = [one.get("path") for one in identities or () if isinstance(one, dict)] if shards else []
    return (*shards[:1], *(path for path in found[:1] if isinstance(path, str)))


def sample_latents(
    loaded: Loaded,
    mesh: Mesh,
    condition: Condition,
    negative: Condition,
    shape,
    ids: Tensor,
    seed: int,
    config: SampleConfig,
) -> Tensor:
    """Latents (n, C, F, H, W) of the condition's n samples; sample i starts from the
    noise of (seed, ids[i]).

    Args:
        negative: text of a single sample, for all; first frames are the condition's own.
    """
    condition = condition.to(mesh.device)
    negative = replace(
        negative.repeat(len(condition.lengths)).to(mesh.device),
        visual=condition.visual,
        image=condition.image,
        first=condition.first,
    )
    sampler = Sampler(loaded.model, mesh, condition, negative)
    z = sample_noise(seed, ids.to(mesh.device), shape)
    if config.steps == 1 and config.plain:
        return sampler.one_step(z)
    if config.steps == 2 and config.plain and loaded.one_step:
        return sampler.two_steps(
            z, sample_noise(seed, ids.to(mesh.device), shape, "renoise"), loaded.two_step_t
        )
    return sampler.euler(z, config.steps, config.guidance)


def sample_to_files(config: SampleConfig) -> list[Path]:
    """Runs `megatron-apt sample`; returns the files written: one per sample, and a grid for pictures."""
    check_output_folder("out", config.out)
    if config.image:
        check_input_file("image", config.image)
    mesh = startup.start(ParallelConfig())
    loaded = load_generator(config.checkpoint, mesh, config.weights)
    dataset = _dataset(config, loaded)
    _check_dataset(dataset, loaded)
    device = str(mesh.device)
    shape = (dataset.shapes[0][0], *(config.size or dataset.shapes[0][1:]))
    prompts = config.prompts or tuple(dict.fromkeys(dataset.captions))[:8]
    codec = dataset.codec(device, config.decode_tiling)
    _check_picture(config, loaded, codec.pixel_size(*shape[1:]), shape)
    for line in _remarks(config, loaded):
        print(f"megatron-apt: {line}", file=sys.stderr)
    pictures = _first_frames(config, loaded.model.model, dataset, codec, prompts, shape, device)
    texts, pooled, negative = _encoded(config, loaded, dataset, prompts, device)
    out, fps = Path(config.out), _rate(config, dataset)
    out.mkdir(parents=True, exist_ok=True)
    files, clips = [], []
    for seed, (number, prompt) in itertools.product(config.seeds, enumerate(prompts)):
        # A prompt's noise depends on its seed alone, so samples of one seed can be
        # compared across prompts and checkpoints.
        condition = Condition.pack(
            [texts[number]], loaded.text_length, None if pooled is None else pooled[number : number + 1]
        )
        condition = replace(condition, **pictures[number])
        latent = sample_latents(
            loaded, mesh, condition, negative, shape, torch.zeros(1, dtype=torch.int64), seed, config
        )
        frames = codec.decode(latent[0].cpu()).clamp(-1, 1)
        path = out / f"{number:03d}-{_file_name(prompt)}-seed{seed}.{config.format}"
        _write(frames, path, config, fps)
        files.append(path)
        clips.append(frames)
    if config.format == "png" and len(clips) > 1:
        grid = out / "grid.png"
        media.save_png_grid(
            torch.stack([clip[:, 0] for clip in clips]), grid, columns=len(prompts), scale=config.scale
        )
        files.append(grid)
    print("\n".join(map(str, files)))
    return files


def _dataset(config: SampleConfig, loaded: Loaded) -> Encoding:
    """The dataset asked for, or the first of the run's; where that is not there any more,
    what the run has kept of it.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    if config.dataset:
        return LatentShards(config.dataset)
    if not loaded.shards:
        raise ValueError(
            f"{config.checkpoint}: was trained on no dataset, whose codec and text encoder samples need; "
            "give one with --dataset"
        )
    for path in loaded.shards:
        if Path(path).is_dir():
            return LatentShards(path)
    if loaded.kept.is_dir():
        return KeptEncoding(loaded.kept)
    return LatentShards(loaded.shards[0])  # which says that it is not there


def _check_picture(
    config: SampleConfig, loaded: Loaded, pixels: tuple[int, int, int], shape: tuple[int, ...]
) -> None:
    """Finds before sampling what cannot be sampled or written.

    Args:
        pixels: frames, height and width of a sample.
        shape: of its latent.

    Raises:
        ValueError: naming the setting.
    """
    patch = loaded.model.model.patch
    if any(n % p for n, p in zip(shape[1:], patch, strict=True)):
        raise ValueError(
            f"size={tuple(shape[1:])}: this model reads patches of {patch}, which do not divide it; give "
            "multiples of them"
        )
    frames, height, width = pixels
    if config.format in ("gif", "mp4") and frames == 1:
        raise ValueError(
            f"format={config.format!r}: samples of this size have one frame; use --format png, or a --size "
            "of several latent frames"
        )
    if max(height, width) * config.scale > MOST_SIDE:
        raise ValueError(
            f"scale={config.scale}: makes {width}x{height} pixels a side of more than {MOST_SIDE}; use a "
            "smaller one"
        )


def _remarks(config: SampleConfig, loaded: Loaded) -> list[str]:
    """What is allowed and seldom meant."""
    found = []
    if len(config.prompts) > 1 and all(
        prompt.isascii() and not prompt.strip().count(" ") for prompt in config.prompts
    ):
        listed = ", ".join(map(repr, config.prompts[:8]))
        found.append(
            f"{len(config.prompts)} prompts of one word each ({listed}); if they are one prompt, quote it"
        )
    if loaded.one_step and config.guidance != 1.0:
        found.append(
            f"guidance={config.guidance:g}: guidance was folded into this model when it was distilled; more "
            "of it oversaturates"
        )
    if not loaded.one_step and config.steps < 4:
        found.append(
            f"steps={config.steps}: this is a diffusion model, not trained for so few Euler steps; --steps "
            "25 is usual"
        )
    return found


def _encoded(config: SampleConfig, loaded: Loaded, dataset: Encoding, prompts: Sequence[str], device: str):
    """(rows of each prompt, their pooled vectors or None, the negative prompt's condition)."""
    encoder = dataset.text_encoder(device)
    texts, pooled = encoder.encode_pooled(list(prompts))
    for prompt, text in zip(prompts, texts, strict=True):
        if loaded.text_length and len(text) > loaded.text_length:
            beginning = prompt if len(prompt) <= 80 else f"{prompt[:80]}..."
            warnings.warn(
                f"prompt {beginning!r} has {len(text)} tokens; this model reads the first "
                f"{loaded.text_length}",
                stacklevel=3,
            )
    negative_text, negative_pooled = encoder.encode_pooled([config.negative_prompt])
    return texts, pooled, Condition.pack(negative_text, loaded.text_length, negative_pooled)


def _rate(config: SampleConfig, dataset: Encoding) -> float:
    """Frames per second of what is written."""
    encoded = dataset.info["settings"].get("fps", 0)
    return config.fps or encoded or DEFAULT_FPS


def _first_frames(
    config, model: ModelConfig, dataset: Encoding, codec, prompts, shape, device: str
) -> list[dict[str, Tensor]]:
    """What each prompt's Condition has of a first frame: that of config.image, or of the
    dataset's first sample with this caption.

    Raises:
        ValueError: settings that do not fit the model, or each other.
    """
    given = model.condition_channels or model.image_shape
    if not given and not (model.first_frame and shape[1] > 1):
        if config.image:
            which = (
                "makes a sample of one frame from text" if model.first_frame else "is given no first frame"
            )
            raise ValueError(f"image={config.image!r}: this model {which}; leave it out")
        return [first_frames([FirstFrame()], model)] * len(prompts)
    if config.image:
        from megatron_apt.encode.decode import Clip, decode_clip  # DALI, which only this needs

        frames, height, width = codec.pixel_size(*shape[1:])
        frame = decode_clip(Clip(Path(config.image), height, width, allow_upscale=True))
        encoder = dataset.image_encoder(device) if model.image_shape else None
        image = None if encoder is None else encoder.encode(frame)
        first = FirstFrame(
            codec.given(frame, frames) if model.condition_channels else None,
            image,
            codec.encode(frame) if model.first_frame else None,
        )
        return [first_frames([first], model)] * len(prompts)
    if config.prompts:
        raise ValueError(
            "this model is given a first frame: add --image FILE to --prompts, or leave both out for "
            "captions and frames of the dataset"
        )
    if config.size and config.size != dataset.shapes[0][1:]:
        raise ValueError(
            f"size={config.size}: the dataset's first frames are of {dataset.shapes[0][1:]}; add --image "
            "FILE for another size"
        )
    if not isinstance(dataset, LatentShards):
        raise ValueError(
            f"{dataset.path}: keeps no first frames, and this model is given one; add --image FILE, or give "
            "the run's dataset with --dataset"
        )
    return [first_frames([dataset[dataset.captions.index(prompt)].first_frame], model) for prompt in prompts]


def _check_dataset(dataset: Encoding, loaded: Loaded) -> None:
    model = loaded.model.model
    found, needed = (
        (dataset.shapes[0][0], dataset.null_text.shape[-1]),
        (model.latent_channels, model.text_width),
    )
    if found != needed:
        raise ValueError(
            f"dataset {dataset.path}: latent channels and text width are {found}, the checkpoint's {needed}; "
            "give the dataset of its run"
        )
    check_first_frames(dataset, model)


def _file_name(prompt: str) -> str:
    """The beginning of a prompt as a part of a file's name, which file systems limit in
    bytes (of UTF-8), not characters.
    """
    name = "".join(c if c.isalnum() else "-" for c in prompt).encode()[:MOST_NAME].decode(errors="ignore")
    return name.strip("-") or "empty"


def _write(frames: Tensor, path: Path, config: SampleConfig, fps: float) -> None:
    """(3, F, H, W) in [-1, 1] as the format asked for; a PNG shows the frames side by side."""
    if config.format == "mp4":
        media.save_mp4(frames, path, fps=fps, scale=config.scale)
    elif config.format == "gif":
        media.save_gif(frames[None], path, fps=fps, columns=1, scale=config.scale)
    else:
        media.save_png_grid(frames.transpose(0, 1), path, columns=frames.shape[1], scale=config.scale)
