"""FLUX.1 dev (12B) into a one-step generator of pictures, on 64 GPUs.

Not run at this size; tests build the recipes and run a tiny Flux.

    megatron-apt convert import FLUX.1-dev runs/flux/pretrained
    megatron-apt encode --source pictures/ --output data/images \\
        --height 1024 --width 1024 \\
        --codec kl --codec-path FLUX.1-dev/vae --text FLUX.1-dev
    srun megatron-apt train examples/flux.py:consistency
    srun megatron-apt train examples/flux.py:apt
    megatron-apt convert export runs/flux/apt flux-one-step --base FLUX.1-dev

The published weights hold guidance already: they are told its scale (model.guidance,
3.5 as in the pipeline), in every stage the same, and the exported pipeline is called with
it as its guidance_scale. Losses, learning rates, sigma, s, averages and numbers of
updates are the APT paper's for images; batches are smaller (see examples/wan.py).
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
from megatron_apt.families.flux.config import flux_dev
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.consistency.config import ConsistencyConfig

PRETRAINED = "runs/flux/pretrained"
LENGTH = 512  # of the T5, which pads; the model reads the padding


def consistency() -> RunConfig:
    """Stage 1: nothing to fold in (guidance 1); shift 3, near that of the pipeline at 1024 x 1024."""
    return RunConfig(
        method="consistency",
        output="runs/flux/consistency",
        iterations=5000,
        global_batch=256,
        micro_batch=4,
        model=flux_dev(),
        parallel=ParallelConfig(tp=2, pp=2, sequence_parallel=True),
        data=DataConfig(shards=("data/images",), text_length=LENGTH),
        init=InitConfig(diffusion=PRETRAINED),
        optimizer=OptimizerConfig(kind="adamw", lr=1e-5, weight_decay=0.01, ema=0.0),
        consistency=ConsistencyConfig(steps=32, shift=3.0, guidance_scale=1.0),
        save_every=500,
    )


def apt() -> RunConfig:
    """Stage 2: lr 5e-6, 350 updates, aR1 sigma 0.01, s = 1."""
    return replace(
        consistency(),
        method="apt",
        output="runs/flux/apt",
        iterations=350,
        global_batch=1024,
        init=InitConfig(generator="runs/flux/consistency", diffusion=PRETRAINED),
        optimizer=OptimizerConfig(kind="rmsprop", lr=5e-6, alpha=0.9, ema=0.995),
        apt=AptConfig(ar1_lambda=100.0, ar1_sigma=0.01, timestep_shift=1.0),
        save_every=25,
        retention=RetentionConfig(last=14),
    )
