"""The paper's image stage at its own scale: 8B parameters, 1024 x 1024, batch 9062, 128
to 256 H100. Not run here; the tests build it.

    srun megatron-apt train examples/image.py:apt --data.shards DATASET \\
        --init.generator DISTILLED --init.diffusion DIFFUSION
"""

from megatron_apt.config import DataConfig, OptimizerConfig, ParallelConfig, RunConfig
from megatron_apt.families.mmdit.config import seaweed_8b
from megatron_apt.methods.recipes import distilled, paper_images


def flow() -> RunConfig:
    """Stage 0: flow matching."""
    return RunConfig(
        method="flow",
        output="runs/image/flow",
        iterations=100_000,
        global_batch=1024,
        micro_batch=1,
        model=seaweed_8b(),
        parallel=ParallelConfig(tp=4),
        data=DataConfig(shards=("data/images",)),
        optimizer=OptimizerConfig(kind="adamw", lr=1e-4, warmup=1000, ema=0.9999),
        save_every=1000,
    )


def consistency() -> RunConfig:
    """Stage 1: CFG 7.5 and a fixed negative prompt folded in."""
    return distilled(flow(), shift=1.0, guidance_scale=7.5, output="runs/image/consistency")


def apt() -> RunConfig:
    """Stage 2: batch 9062 (no multiple of anything: the remainder is dealt out)."""
    return paper_images(flow(), output="runs/image/apt", global_batch=9062)
