"""HunyuanVideo (13B) into a one-step generator, on 256 GPUs.

Not run at this size; tests build the recipes and run a tiny HunyuanVideo.

    megatron-apt convert import HunyuanVideo runs/hunyuan/pretrained
    megatron-apt encode --source clips/ --output data/videos \\
        --frames 49 --height 544 --width 960 --fps 24 \\
        --codec hunyuan --codec-path HunyuanVideo/vae --text HunyuanVideo
    srun megatron-apt train examples/hunyuan.py:consistency
    srun megatron-apt train examples/hunyuan.py:image
    srun megatron-apt train examples/hunyuan.py:video
    megatron-apt convert export runs/hunyuan/video hunyuan-one-step --base HunyuanVideo

The published weights hold guidance already: they are told its scale
(model.guidance, 6 as in the pipeline), in every stage the same, and the exported
pipeline is called with it as its guidance_scale. Losses, learning rates, sigma, s,
averages and numbers of updates are the APT paper's; batches are smaller (see
examples/wan.py).
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
from megatron_apt.families.hunyuan.config import hunyuan_video
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.consistency.config import ConsistencyConfig

PRETRAINED = "runs/hunyuan/pretrained"


def consistency() -> RunConfig:
    """Stage 1, on pictures and clips: nothing to fold in (guidance 1); shift 7, with
    which the model is sampled.
    """
    return RunConfig(
        method="consistency",
        output="runs/hunyuan/consistency",
        iterations=5000,
        global_batch=256,
        micro_batch=1,
        model=hunyuan_video(),
        parallel=ParallelConfig(tp=4, cp=2, pp=4, sequence_parallel=True),
        data=DataConfig(shards=("data/videos", "data/images"), weights=(3, 1)),
        init=InitConfig(diffusion=PRETRAINED),
        optimizer=OptimizerConfig(kind="adamw", lr=1e-5, weight_decay=0.01, ema=0.0),
        consistency=ConsistencyConfig(steps=32, shift=7.0, guidance_scale=1.0),
        save_every=500,
    )


def image() -> RunConfig:
    """Stage 2 on pictures: lr 5e-6, 350 updates, aR1 sigma 0.01, s = 1."""
    return replace(
        consistency(),
        method="apt",
        output="runs/hunyuan/image",
        iterations=350,
        global_batch=1024,
        data=DataConfig(shards=("data/images",)),
        init=InitConfig(generator="runs/hunyuan/consistency", diffusion=PRETRAINED),
        optimizer=OptimizerConfig(kind="rmsprop", lr=5e-6, alpha=0.9, ema=0.995),
        apt=AptConfig(ar1_lambda=100.0, ar1_sigma=0.01, timestep_shift=1.0),
        save_every=25,
        retention=RetentionConfig(last=14),
    )


def video() -> RunConfig:
    """Stage 2 on clips, from the pictures' average: lr 3e-6, 300 updates, sigma 0.1, s = 12."""
    return replace(
        image(),
        output="runs/hunyuan/video",
        iterations=300,
        global_batch=512,
        data=DataConfig(shards=("data/videos",)),
        init=InitConfig(generator="runs/hunyuan/image:ema", diffusion=PRETRAINED),
        optimizer=OptimizerConfig(kind="rmsprop", lr=3e-6, alpha=0.9, ema=0.995),
        apt=AptConfig(ar1_lambda=100.0, ar1_sigma=0.1, timestep_shift=12.0),
    )
