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

from megatron_apt.config import DataConfig, InitConfig, ParallelConfig, RunConfig
from megatron_apt.families.sd3.config import sd35_large, sd35_medium
from megatron_apt.methods.recipes import after, distilled, paper_images


def consistency() -> RunConfig:
    """Stage 1: guidance 4.5 and the shift of 3 the model was trained with."""
    base = RunConfig(
        output="runs/sd35/consistency",
        global_batch=256,
        micro_batch=4,
        model=sd35_medium(),
        # Of CLIP and of T5; the encoders pad to this, and the model reads the padding
        data=DataConfig(shards=("data/images",), text_length=77 + 256),
        init=InitConfig(diffusion="runs/sd35/pretrained"),
    )
    return distilled(base, shift=3.0, guidance_scale=4.5)


def apt() -> RunConfig:
    """Stage 2."""
    return _adversarial(consistency(), "runs/sd35/apt")


def consistency_large() -> RunConfig:
    """Stage 1 of 8B: two tensor-parallel ranks, and a pipeline of 2 stages."""
    return replace(
        consistency(),
        output="runs/sd35/consistency-large",
        model=sd35_large(),
        parallel=ParallelConfig(tp=2, pp=2, sequence_parallel=True),
    )


def apt_large() -> RunConfig:
    """Stage 2 of 8B."""
    return _adversarial(consistency_large(), "runs/sd35/apt-large")


def _adversarial(first: RunConfig, output: str) -> RunConfig:
    return paper_images(first, output=output, global_batch=1024, init=after(first))
