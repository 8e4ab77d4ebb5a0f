"""The paper's video stage at its own scale: 8B parameters, 1280 x 720, 2 s at 24 fps,
batch 2048, 1,024 H100. Not run here; the tests build it.

srun megatron-apt train examples/video.py:apt --data.shards DATASET --init.generator
runs/image/apt:ema --init.diffusion DIFFUSION
"""

from dataclasses import replace

import image

from megatron_apt.config import DataConfig, OptimizerConfig, ParallelConfig, RunConfig
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.consistency.config import ConsistencyConfig

PARALLEL = ParallelConfig(tp=4, cp=2)


def flow() -> RunConfig:
    """Stage 0 on a mixture of videos and images."""
    data = DataConfig(shards=("data/videos", "data/images"), weights=(3, 1))
    return replace(image.flow(), output="runs/video/flow", parallel=PARALLEL, data=data)


def consistency() -> RunConfig:
    """Stage 1: the grid shifted by 24 for videos."""
    return replace(
        image.consistency(),
        output="runs/video/consistency",
        parallel=PARALLEL,
        data=DataConfig(shards=("data/videos",)),
        consistency=ConsistencyConfig(steps=32, shift=24.0, guidance_scale=7.5),
    )


def apt() -> RunConfig:
    """Stage 2: G from the image stage's EMA, D again from the diffusion weights; lr 3e-6,
    batch 2048, 300 updates, sigma 0.1, s = 12.
    """
    return replace(
        image.apt(),
        output="runs/video/apt",
        iterations=300,
        global_batch=2048,
        parallel=PARALLEL,
        data=DataConfig(shards=("data/videos",)),
        optimizer=OptimizerConfig(kind="rmsprop", lr=3e-6, alpha=0.9, ema=0.995),
        apt=AptConfig(ar1_lambda=100.0, ar1_sigma=0.1, timestep_shift=12.0),
    )
