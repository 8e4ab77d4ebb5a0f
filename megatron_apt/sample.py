"""Samples from a checkpoint: loads the generator with the codec and text encoder of the data it was trained on."""

import itertools
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_apt import media
from megatron_apt.checkpoint import store
from megatron_apt.checkpoint.fits import check_model
from megatron_apt.checkpoint.state import from_dict
from megatron_apt.config import ParallelConfig
from megatron_apt.data.batches import check_first_frames, first_frames
from megatron_apt.data.shards import FirstFrame, LatentShards
from megatron_apt.models.backbone import Backbone
from megatron_apt.models.condition import Condition
from megatron_apt.models.config import Fp8Config, ModelConfig
from megatron_apt.models.families import build_backbone
from megatron_apt.networks import load_weights
from megatron_apt.parallel import startup
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.sampling import Sampler, sample_noise


@dataclass(frozen=True)
class Loaded:
    """A generator ready to sample.

    Attributes:
        model: the network, in evaluation of one checkpoint's weights.
        text_length: padding its captions were trained with.
        shards: encoded datasets of its run.
        two_step_t: where the two-step procedure returns to noise.
    """

    model: Backbone
    text_length: int
    shards: tuple[str, ...]
    two_step_t: float


def load_generator(checkpoint: str, mesh: Mesh, weights: str = "ema") -> Loaded:
    """The generator of a run folder or iteration-* folder.

    Raises:
        CheckpointError: nothing there, or it has no such weights.
    """
    folder = store.resolve(checkpoint)
    state = store.read_state(folder)
    if weights == "ema" and not state["ema"]:
        raise store.CheckpointError(f"{checkpoint}: was trained without EMA (optimizer.ema=0); use --weights raw")
    config = state["config"]
    check_model(store.Stored(folder), model_config(config["model"]), mesh)
    model = build_backbone(model_config(config["model"]), mesh).to(mesh.device)
    load_weights(f"{checkpoint}:{weights}", model, mesh)
    data = config["data"]
    return Loaded(model.eval().requires_grad_(False), data["text_length"], tuple(data["shards"]), config["apt"]["two_step_t"])


def model_config(stored: dict) -> ModelConfig:
    """ModelConfig from its JSON form, for sampling, which is done in the dtype of the weights."""
    return replace(from_dict(ModelConfig, stored), fp8=Fp8Config())


def sample_latents(loaded: Loaded, mesh: Mesh, condition: Condition, negative: Condition, shape, ids: Tensor, seed: int, config) -> Tensor:
    """Latents (n, C, F, H, W) of the condition's n samples; sample i starts from the noise of (seed, ids[i]).

    Args:
        negative: text of a single sample, for all; first frames are the condition's own.
        config: a SampleConfig.
    """
    condition = condition.to(mesh.device)
    negative = replace(negative.repeat(len(condition.lengths)).to(mesh.device), visual=condition.visual, image=condition.image, first=condition.first)
    sampler = Sampler(loaded.model, mesh, condition, negative)
    z = sample_noise(seed, ids.to(mesh.device), shape)
    if config.steps == 1 and not config.euler and config.guidance == 1.0:
        return sampler.one_step(z)
    if config.steps == 2 and not config.euler and config.guidance == 1.0:
        return sampler.two_steps(z, sample_noise(seed, ids.to(mesh.device), shape, "renoise"), loaded.two_step_t)
    return sampler.euler(z, config.steps, config.guidance)


def sample_to_files(config) -> list[Path]:
    """Runs `megatron-apt sample`; returns the files written: one per sample, and a grid for pictures.

    Args:
        config: cli.SampleConfig.
    """
    if config.steps < 1:
        raise ValueError(f"steps={config.steps}: give at least 1")
    mesh = startup.start(ParallelConfig())
    loaded = load_generator(config.checkpoint, mesh, config.weights)
    if not (config.dataset or loaded.shards):
        raise ValueError(f"{config.checkpoint}: was trained on no dataset, whose codec and text encoder samples need; give one with --dataset")
    dataset = LatentShards(config.dataset or loaded.shards[0])
    _check_dataset(dataset, loaded)
    device = str(mesh.device)
    shape = (dataset.shapes[0][0], *(config.size or dataset.shapes[0][1:]))
    prompts = config.prompts or tuple(dict.fromkeys(dataset.captions))[:8]
    codec = dataset.codec(device, config.decode_tiling)
    pictures = _first_frames(config, loaded.model.model, dataset, codec, prompts, shape, device)
    encoder = dataset.text_encoder(device)
    texts, pooled = encoder.encode_pooled(list(prompts))
    for prompt, text in zip(prompts, texts, strict=True):
        if loaded.text_length and len(text) > loaded.text_length:
            warnings.warn(f"prompt {prompt!r} has {len(text)} tokens; this model reads the first {loaded.text_length}", stacklevel=2)
    negative_text, negative_pooled = encoder.encode_pooled([config.negative_prompt])
    negative = Condition.pack(negative_text, loaded.text_length, negative_pooled)
    del encoder  # may hold more memory than the generator
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    files, clips = [], []
    for seed, (number, prompt) in itertools.product(config.seeds, enumerate(prompts)):
        # A prompt's noise depends on its seed alone, so samples of one seed can be compared across prompts and checkpoints.
        condition = Condition.pack([texts[number]], loaded.text_length, None if pooled is None else pooled[number : number + 1])
        condition = replace(condition, **pictures[number])
        latent = sample_latents(loaded, mesh, condition, negative, shape, torch.zeros(1, dtype=torch.int64), seed, config)
        frames = codec.decode(latent[0].cpu()).clamp(-1, 1)
        path = out / f"{number:03d}-{_file_name(prompt)}-seed{seed}.{config.format}"
        _write(frames, path, config)
        files.append(path)
        clips.append(frames)
    if config.format == "png" and len(clips) > 1:
        grid = out / "grid.png"
        media.save_png_grid(torch.stack([clip[:, 0] for clip in clips]), grid, columns=len(prompts), scale=config.scale)
        files.append(grid)
    print("\n".join(map(str, files)))
    return files


def _first_frames(config, model: ModelConfig, dataset: LatentShards, codec, prompts, shape, device: str) -> list[dict[str, Tensor]]:
    """What each prompt's Condition has of a first frame: that of config.image, or of the dataset's first sample with this caption.

    Raises:
        ValueError: settings that do not fit the model, or each other.
    """
    given = model.condition_channels or model.wan.image_width
    if not given and not (model.wan.first_frame and shape[1] > 1):
        if config.image:
            which = "makes a sample of one frame from text" if model.wan.first_frame else "is given no first frame"
            raise ValueError(f"image={config.image!r}: this model {which}; leave it out")
        return [first_frames([FirstFrame()], model)] * len(prompts)
    if config.image:
        from megatron_apt.data.decode import Clip, decode_clip  # DALI, which only this needs

        frames, height, width = codec.pixel_size(*shape[1:])
        frame = decode_clip(Clip(Path(config.image), height, width, allow_upscale=True))
        encoder = dataset.image_encoder(device) if model.wan.image_width else None
        image = None if encoder is None else encoder.encode(frame)
        first = FirstFrame(
            codec.given(frame, frames) if model.condition_channels else None, image, codec.encode(frame) if model.wan.first_frame else None
        )
        return [first_frames([first], model)] * len(prompts)
    if config.prompts:
        raise ValueError("this model is given a first frame: add --image FILE to --prompts, or leave both out for captions and frames of the dataset")
    if config.size and config.size != dataset.shapes[0][1:]:
        raise ValueError(f"size={config.size}: the dataset's first frames are of {dataset.shapes[0][1:]}; add --image FILE for another size")
    return [first_frames([dataset[dataset.captions.index(prompt)].first_frame], model) for prompt in prompts]


def _check_dataset(dataset: LatentShards, loaded: Loaded) -> None:
    model = loaded.model.model
    found, needed = (dataset.shapes[0][0], dataset.null_text.shape[-1]), (model.latent_channels, model.text_width)
    if found != needed:
        raise ValueError(
            f"dataset {dataset.path}: latent channels and text width are {found}, the checkpoint's {needed}; give the dataset of its run"
        )
    check_first_frames(dataset, model)


def _file_name(prompt: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in prompt)[:80].strip("-") or "empty"


def _write(frames: Tensor, path: Path, config) -> None:
    """(3, F, H, W) in [-1, 1] as the format asked for; a PNG shows the frames side by side."""
    if config.format == "mp4":
        media.save_mp4(frames, path, fps=config.fps, scale=config.scale)
    elif config.format == "gif":
        media.save_gif(frames[None], path, fps=config.fps, columns=1, scale=config.scale)
    else:
        media.save_png_grid(frames.transpose(0, 1), path, columns=frames.shape[1], scale=config.scale)
