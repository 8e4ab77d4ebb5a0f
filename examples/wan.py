"""A pretrained Wan into a one-step generator: 1.3B and 5B on 32 GPUs, 14B on 256.

Not run at this size; tests build the recipes and run a tiny Wan.

    megatron-apt convert import Wan2.1-T2V-1.3B-Diffusers runs/wan/pretrained
    megatron-apt encode --source clips/ --output data/videos \\
        --frames 49 --height 480 --width 832 --fps 16 \\
        --codec wan --codec-path Wan2.1-T2V-1.3B-Diffusers/vae \\
        --text Wan2.1-T2V-1.3B-Diffusers
    srun megatron-apt train examples/wan.py:consistency
    srun megatron-apt train examples/wan.py:image
    srun megatron-apt train examples/wan.py:video
    megatron-apt convert export runs/wan/video wan-one-step --base Wan2.1-T2V-1.3B-Diffusers

Image to video with Wan2.1's 14B (one consistency and one APT stage, both on clips; a
sample continues a given first frame):

    megatron-apt convert import Wan2.1-I2V-14B-480P-Diffusers runs/wan/pretrained-i2v
    megatron-apt encode --source clips/ --output data/videos-i2v \\
        --frames 49 --height 480 --width 832 --fps 16 --image-to-video \\
        --codec wan --codec-path Wan2.1-I2V-14B-480P-Diffusers/vae \\
        --text Wan2.1-I2V-14B-480P-Diffusers
    srun megatron-apt train examples/wan.py:consistency_i2v_14b
    srun megatron-apt train examples/wan.py:video_i2v_14b
    megatron-apt sample runs/wan/video-i2v-14b --image first.png \\
        --prompts "the boat leaves the harbour" --format mp4 --fps 16
    megatron-apt convert export runs/wan/video-i2v-14b wan-i2v-one-step \\
        --base Wan2.1-I2V-14B-480P-Diffusers

With Wan2.2's 5B, whose weights and datasets are those of text to video (which
`--model.no-first-frame` trains instead):

    megatron-apt convert import Wan2.2-TI2V-5B-Diffusers runs/wan/pretrained-5b --first-frame
    megatron-apt encode --source clips/ --output data/videos-5b \\
        --frames 49 --height 704 --width 1280 --fps 24 \\
        --codec wan --codec-path Wan2.2-TI2V-5B-Diffusers/vae \\
        --text Wan2.2-TI2V-5B-Diffusers
    srun megatron-apt train examples/wan.py:consistency_i2v_5b
    srun megatron-apt train examples/wan.py:video_i2v_5b
    megatron-apt sample runs/wan/video-i2v-5b --image first.png \\
        --prompts "the boat leaves the harbour" --format mp4 --fps 24
    megatron-apt convert export runs/wan/video-i2v-5b wan-i2v-one-step \\
        --base Wan2.2-TI2V-5B-Diffusers

Losses, learning rates, sigma, s, averages and numbers of updates are the APT paper's.
Batches are not: it had 1,024 GPUs. RMSProp's steps hardly depend on the size of a
gradient, so smaller batches keep the learning rate and take noisier steps.
"""

from dataclasses import replace

from megatron_apt.config import (
    DataConfig,
    InitConfig,
    OptimizerConfig,
    ParallelConfig,
    RetentionConfig,
    RunConfig,
)
from megatron_apt.families.wan.config import wan_1_3b, wan_5b_i2v, wan_14b, wan_14b_i2v
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.consistency.config import ConsistencyConfig

PRETRAINED = "runs/wan/pretrained"
PRETRAINED_5B = "runs/wan/pretrained-5b"
PRETRAINED_I2V = "runs/wan/pretrained-i2v"
LENGTH = 512  # Wan reads captions padded with zeros to this, unmasked


def consistency() -> RunConfig:
    """Stage 1, on pictures and clips: guidance 5 (Wan's own for 480p) folded in; shift 5
    for its mostly video grid.
    """
    return RunConfig(
        method="consistency",
        output="runs/wan/consistency",
        iterations=5000,
        global_batch=256,
        micro_batch=1,
        model=wan_1_3b(),
        parallel=ParallelConfig(tp=2, cp=2, sequence_parallel=True),
        data=DataConfig(shards=("data/videos", "data/images"), weights=(3, 1), text_length=LENGTH),
        init=InitConfig(diffusion=PRETRAINED),
        optimizer=OptimizerConfig(kind="adamw", lr=1e-5, weight_decay=0.01, ema=0.0),
        consistency=ConsistencyConfig(steps=32, shift=5.0, guidance_scale=5.0),
        save_every=500,
    )


def image() -> RunConfig:
    """Stage 2 on pictures: lr 5e-6, 350 updates, aR1 sigma 0.01, s = 1."""
    return replace(
        consistency(),
        method="apt",
        output="runs/wan/image",
        iterations=350,
        global_batch=1024,
        data=DataConfig(shards=("data/images",), text_length=LENGTH),
        init=InitConfig(generator="runs/wan/consistency", diffusion=PRETRAINED),
        optimizer=OptimizerConfig(kind="rmsprop", lr=5e-6, alpha=0.9, ema=0.995),
        apt=AptConfig(ar1_lambda=100.0, ar1_sigma=0.01, timestep_shift=1.0),
        save_every=25,
        retention=RetentionConfig(last=14),
    )


def video() -> RunConfig:
    """Stage 2 on clips, from the pictures' average: lr 3e-6, 300 updates, sigma 0.1, s = 12."""
    return replace(
        image(),
        output="runs/wan/video",
        iterations=300,
        global_batch=512,
        data=DataConfig(shards=("data/videos",), text_length=LENGTH),
        init=InitConfig(generator="runs/wan/image:ema", diffusion=PRETRAINED),
        optimizer=OptimizerConfig(kind="rmsprop", lr=3e-6, alpha=0.9, ema=0.995),
        apt=AptConfig(ar1_lambda=100.0, ar1_sigma=0.1, timestep_shift=12.0),
    )


def _large(config: RunConfig) -> RunConfig:
    """14B: G and D of 40 blocks in a pipeline of 4 stages, 8 GPUs a stage."""
    return replace(
        config,
        model=wan_14b(),
        output=f"{config.output}-14b",
        parallel=ParallelConfig(tp=4, cp=2, pp=4, sequence_parallel=True),
    )


def consistency_14b() -> RunConfig:
    """Stage 1."""
    return _large(consistency())


def image_14b() -> RunConfig:
    """Stage 2 on pictures."""
    return replace(
        _large(image()), init=InitConfig(generator="runs/wan/consistency-14b", diffusion=PRETRAINED)
    )


def video_14b() -> RunConfig:
    """Stage 2 on clips."""
    return replace(_large(video()), init=InitConfig(generator="runs/wan/image-14b:ema", diffusion=PRETRAINED))


def _image_to_video(config: RunConfig) -> RunConfig:
    """On clips alone: a picture that is its own first frame leaves nothing to generate."""
    return replace(
        config, model=wan_14b_i2v(), data=DataConfig(shards=("data/videos-i2v",), text_length=LENGTH)
    )


def consistency_i2v_14b() -> RunConfig:
    """Stage 1."""
    return replace(
        _image_to_video(consistency_14b()),
        output="runs/wan/consistency-i2v-14b",
        init=InitConfig(diffusion=PRETRAINED_I2V),
    )


def video_i2v_14b() -> RunConfig:
    """Stage 2, from the distilled model."""
    init = InitConfig(generator="runs/wan/consistency-i2v-14b", diffusion=PRETRAINED_I2V)
    return replace(_image_to_video(video_14b()), output="runs/wan/video-i2v-14b", init=init)


def _five(config: RunConfig) -> RunConfig:
    """Wan2.2's 5B on clips; one of 49 frames at 704 x 1280 is 11,440 tokens."""
    data = DataConfig(shards=("data/videos-5b",), text_length=LENGTH)
    return replace(config, model=wan_5b_i2v(), output=f"{config.output}-i2v-5b", data=data)


def consistency_i2v_5b() -> RunConfig:
    """Stage 1."""
    return replace(_five(consistency()), init=InitConfig(diffusion=PRETRAINED_5B))


def video_i2v_5b() -> RunConfig:
    """Stage 2, from the distilled model."""
    return replace(
        _five(video()), init=InitConfig(generator="runs/wan/consistency-i2v-5b", diffusion=PRETRAINED_5B)
    )
