"""The stages that turn a diffusion model into a one-step generator, with the settings of
the APT paper. A recipe says what differs: model, data, mesh, batch and folders.

    first = distilled(RunConfig(model=..., data=..., parallel=...), shift=5.0, guidance_scale=5.0)
    second = paper_images(first, output="runs/image", init=after(first))
    third = paper_videos(second, output="runs/video", init=after(second))

Batches are the recipe's: the paper's of 9,062 pictures and 2,048 clips want 128 to 1,024
GPUs. RMSProp's steps hardly depend on the size of a gradient, so smaller batches keep the
learning rate and take noisier steps.
"""

from dataclasses import replace

from megatron_apt.config import InitConfig, OptimizerConfig, RetentionConfig, RunConfig
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.consistency.config import ConsistencyConfig


def distilled(base: RunConfig, shift: float, guidance_scale: float, **changes) -> RunConfig:
    """Stage 1, consistency distillation: 5,000 updates on a grid of 32 steps.

    Args:
        shift: of the grid; larger for videos than for pictures.
        guidance_scale: folded into the weights; 1 for none.
        changes: fields of the run that differ from `base`.
    """
    stage = replace(
        base,
        method="consistency",
        iterations=5000,
        optimizer=OptimizerConfig(kind="adamw", lr=1e-5, weight_decay=0.01, ema=0.0),
        consistency=ConsistencyConfig(steps=32, shift=shift, guidance_scale=guidance_scale),
        save_every=500,
    )
    return replace(stage, **changes)


def paper_images(base: RunConfig, **changes) -> RunConfig:
    """Stage 2, APT, on pictures: lr 5e-6, 350 updates, aR1 sigma 0.01, s = 1."""
    return _adversarial(base, iterations=350, lr=5e-6, sigma=0.01, shift=1.0, changes=changes)


def paper_videos(base: RunConfig, **changes) -> RunConfig:
    """Stage 2, APT, on clips: lr 3e-6, 300 updates, aR1 sigma 0.1, s = 12."""
    return _adversarial(base, iterations=300, lr=3e-6, sigma=0.1, shift=12.0, changes=changes)


def after(previous: RunConfig) -> InitConfig:
    """What a stage starts from: the generator of the one before, its average where it
    keeps one, and the same diffusion weights.
    """
    weights = ":ema" if previous.optimizer.ema else ""
    return InitConfig(generator=f"{previous.output}{weights}", diffusion=previous.init.diffusion)


def _adversarial(
    base: RunConfig, iterations: int, lr: float, sigma: float, shift: float, changes: dict
) -> RunConfig:
    stage = replace(
        base,
        method="apt",
        iterations=iterations,
        optimizer=OptimizerConfig(kind="rmsprop", lr=lr, alpha=0.9, ema=0.995),
        apt=AptConfig(ar1_lambda=100.0, ar1_sigma=sigma, timestep_shift=shift),
        save_every=25,
        retention=RetentionConfig(last=14),
    )
    return replace(stage, **changes)
