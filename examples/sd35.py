"""Stable Diffusion 3.5 into a one-step generator: medium on 16 GPUs, large on 64.

Not run at this size; tests build the recipes.

    megatron-apt convert import stable-diffusion-3.5-medium runs/sd35/pretrained
    megatron-apt encode --source pictures/ --output data/images \\
        --height 1024 --width 1024 \\
        --codec kl --codec-path stable-diffusion-3.5-medium/vae \\
        --text stable-diffusion-3.5-medium
    srun megatron-apt train examples/sd35.py:consistency
    srun megatron-apt train examples/sd35.py:apt
    megatron-apt convert export runs/sd35/apt sd35-one-step \\
        --base stable-diffusion-3.5-medium

Losses, learning rates, sigma, s, averages and numbers of updates are the APT paper's for
images; batches are smaller (see examples/wan.py).
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
from megatron_apt.families.sd3.config import sd35_large, sd35_medium
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.consistency.config import ConsistencyConfig

PRETRAINED = "runs/sd35/pretrained"
LENGTH = 77 + 256  # of CLIP and of T5; the encoders pad, and the model reads the padding


def consistency() -> RunConfig:
    """Stage 1: guidance 4.5 and the shift of 3 the model was trained with."""
    return RunConfig(
        method="consistency",
        output="runs/sd35/consistency",
        iterations=5000,
        global_batch=256,
        micro_batch=4,
        model=sd35_medium(),
        parallel=ParallelConfig(),
        data=DataConfig(shards=("data/images",), text_length=LENGTH),
        init=InitConfig(diffusion=PRETRAINED),
        optimizer=OptimizerConfig(kind="adamw", lr=1e-5, weight_decay=0.01, ema=0.0),
        consistency=ConsistencyConfig(steps=32, shift=3.0, guidance_scale=4.5),
        save_every=500,
    )


def apt() -> RunConfig:
    """Stage 2: lr 5e-6, 350 updates, aR1 sigma 0.01, s = 1."""
    return replace(
        consistency(),
        method="apt",
        output="runs/sd35/apt",
        iterations=350,
        global_batch=1024,
        init=InitConfig(generator="runs/sd35/consistency", diffusion=PRETRAINED),
        optimizer=OptimizerConfig(kind="rmsprop", lr=5e-6, alpha=0.9, ema=0.995),
        apt=AptConfig(ar1_lambda=100.0, ar1_sigma=0.01, timestep_shift=1.0),
        save_every=25,
        retention=RetentionConfig(last=14),
    )


def _large(config: RunConfig) -> RunConfig:
    """8B: two tensor-parallel ranks, and a pipeline of 2 stages."""
    return replace(
        config,
        model=sd35_large(),
        output=f"{config.output}-large",
        parallel=ParallelConfig(tp=2, pp=2, sequence_parallel=True),
    )


def consistency_large() -> RunConfig:
    """Stage 1."""
    return _large(consistency())


def apt_large() -> RunConfig:
    """Stage 2."""
    return replace(
        _large(apt()), init=InitConfig(generator="runs/sd35/consistency-large", diffusion=PRETRAINED)
    )
