"""The paper's image stage at its own scale: 8B parameters, 1024 x 1024, batch 9062, 128
to 256 H100. Not run here; the tests build it.

srun megatron-apt train examples/image.py:apt --data.shards DATASET --init.generator
DISTILLED --init.diffusion DIFFUSION
"""

from dataclasses import replace

from megatron_apt.config import DataConfig, OptimizerConfig, ParallelConfig, RetentionConfig, RunConfig
from megatron_apt.families.mmdit.config import seaweed_8b
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.consistency.config import ConsistencyConfig


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
    """Stage 1: CFG 7.5 and a fixed negative prompt folded in; 32 steps."""
    return replace(
        flow(),
        method="consistency",
        output="runs/image/consistency",
        iterations=5000,
        optimizer=OptimizerConfig(kind="adamw", lr=1e-5, weight_decay=0.01, ema=0.0),
        consistency=ConsistencyConfig(steps=32, shift=1.0, guidance_scale=7.5),
        save_every=500,
    )


def apt() -> RunConfig:
    """Stage 2: lr 5e-6, batch 9062 (no multiple of anything: the remainder is dealt out),
    350 updates, aR1 sigma 0.01, s = 1.
    """
    return replace(
        flow(),
        method="apt",
        output="runs/image/apt",
        iterations=350,
        global_batch=9062,
        optimizer=OptimizerConfig(kind="rmsprop", lr=5e-6, alpha=0.9, ema=0.995),
        apt=AptConfig(ar1_lambda=100.0, ar1_sigma=0.01, timestep_shift=1.0),
        save_every=25,
        retention=RetentionConfig(last=14),
    )
