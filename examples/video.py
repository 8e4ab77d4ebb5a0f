"""The paper's video stage at its own scale: 8B parameters, 1280 x 720, 2 s at 24 fps,
batch 2048, 1,024 H100. Not run here; the tests build it.

    srun megatron-apt train examples/video.py:apt --data.shards DATASET \\
        --init.generator runs/image/apt:ema --init.diffusion DIFFUSION
"""

from dataclasses import replace

import image

from megatron_apt.config import DataConfig, ParallelConfig, RunConfig
from megatron_apt.methods.recipes import distilled, paper_videos

PARALLEL = ParallelConfig(tp=4, cp=2)
CLIPS = DataConfig(shards=("data/videos",))


def flow() -> RunConfig:
    """Stage 0 on a mixture of videos and images."""
    data = DataConfig(shards=("data/videos", "data/images"), weights=(3, 1))
    return replace(image.flow(), output="runs/video/flow", parallel=PARALLEL, data=data)


def consistency() -> RunConfig:
    """Stage 1: the grid shifted by 24 for videos."""
    base = replace(image.flow(), output="runs/video/consistency", parallel=PARALLEL, data=CLIPS)
    return distilled(base, shift=24.0, guidance_scale=7.5)


def apt() -> RunConfig:
    """Stage 2: batch 2048; G from the image stage's EMA, D again from the diffusion weights."""
    base = replace(image.flow(), output="runs/video/apt", parallel=PARALLEL, data=CLIPS)
    return paper_videos(base, global_batch=2048)
