"""The demo's runs, each a function that returns a configuration. examples/tiny.py offers
the same ones to `megatron-apt train`.

Real handwritten digits, images first, then clips, on a CPU in minutes. Where a value
differs from the paper's (lr 5e-6 / 3e-6, batch 9062 / 2048, CFG 7.5, 32 steps shifted by
24), it is because this network is ten thousand times smaller.
"""

from dataclasses import dataclass, replace
from typing import Literal

from megatron_apt.config import DataConfig, InitConfig, OptimizerConfig, RunConfig
from megatron_apt.families.mmdit.config import MMDiTConfig
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.consistency.config import ConsistencyConfig
from megatron_apt.methods.flow.config import FlowConfig


@dataclass(frozen=True)
class Place:
    """Where the demo keeps its data and runs, and how long it trains (share of the full
    number of updates).
    """

    root: str = "runs/demo"
    effort: float = 1.0

    def data(self, name: str) -> str:
        return f"{self.root}/data/{name}"

    def run(self, name: str) -> str:
        return f"{self.root}/{name}"

    def updates(self, full: int) -> int:
        return max(4, round(full * self.effort))


@dataclass(frozen=True)
class DemoConfig:
    root: str = "runs/demo"
    stage: Literal["all", "images"] = "all"
    """`images` stops after the image stages and the ablation."""
    quick: bool = False
    """A twentieth of the training: shows that everything runs, not what it reaches."""

    def __post_init__(self) -> None:
        if not self.root.strip():
            raise ValueError(f"root={self.root!r}: give the name of a folder")


def image_flow(place: Place = Place()) -> RunConfig:
    """Stage 0 on 8x8 digits."""
    return RunConfig(
        method="flow",
        output=place.run("images/flow"),
        iterations=place.updates(800),
        global_batch=128,
        micro_batch=64,
        model=MMDiTConfig(latent_channels=1),
        data=DataConfig(shards=(place.data("images"),), text_length=3),
        optimizer=OptimizerConfig(kind="adamw", lr=1e-3, warmup=50, decay="cosine", ema=0.99),
        flow=FlowConfig(condition_dropout=0.1),
        save_every=200,
    )


def image_consistency(place: Place = Place()) -> RunConfig:
    """Stage 1: one-step samples, blurry."""
    base = image_flow(place)
    return replace(
        base,
        method="consistency",
        output=place.run("images/consistency"),
        iterations=place.updates(400),
        optimizer=OptimizerConfig(kind="adamw", lr=2e-4, ema=0.98),
        consistency=ConsistencyConfig(steps=16, shift=1.0, guidance_scale=2.0),
        init=InitConfig(diffusion=base.output),
    )


def image_apt(place: Place = Place()) -> RunConfig:
    """Stage 2: the same network against real data, with a full-depth trainable discriminator and aR1."""
    distilled = image_consistency(place)
    return replace(
        distilled,
        method="apt",
        output=place.run("images/apt"),
        iterations=place.updates(200),
        save_every=50,
        # The discriminator learns faster than the generator: its heads start from
        # nothing, and a generator that follows an ignorant discriminator first forgets
        # what distillation taught it.
        optimizer=OptimizerConfig(kind="rmsprop", lr=5e-5, warmup=20, ema=0.98),
        apt=AptConfig(
            ar1_lambda=100.0,
            ar1_sigma=0.03,
            timestep_shift=1.0,
            discriminator_lr=2e-4,
            discriminator_warmup=20,
        ),
        init=InitConfig(generator=distilled.output, diffusion=distilled.init.diffusion),
    )


def image_apt_without_ar1(place: Place = Place()) -> RunConfig:
    """The paper's collapse ablation: nothing changed but lambda = 0."""
    base = image_apt(place)
    return replace(
        base,
        output=place.run("images/apt_without_ar1"),
        apt=replace(base.apt, ar1_lambda=0.0),
        guards=replace(base.guards, collapse_window=0),
    )


def video_flow(place: Place = Place()) -> RunConfig:
    """Stage 0 on clips of moving digits: 8 frames of 8 x 16 are 64 visual tokens."""
    return replace(
        image_flow(place),
        output=place.run("videos/flow"),
        iterations=place.updates(1000),
        global_batch=96,
        micro_batch=48,
        # A token carries 16 numbers here, 4 for images. The stream must hold all of the
        # noise to take it off again, so it is wider.
        model=MMDiTConfig(latent_channels=4, width=96, depth=4),
        data=DataConfig(shards=(place.data("videos"),), text_length=5),
        optimizer=replace(image_flow(place).optimizer, lr=6e-3),
        # Everything later starts from what the network does at t = 1, where the
        # logit-normal alone seldom trains it.
        flow=FlowConfig(condition_dropout=0.1, shift=2.5),
    )


def video_consistency(place: Place = Place()) -> RunConfig:
    base, images = video_flow(place), image_consistency(place)
    return replace(
        base,
        method="consistency",
        output=place.run("videos/consistency"),
        iterations=place.updates(200),
        # A constant rate leaves noise where the data has none
        optimizer=replace(images.optimizer, decay="cosine"),
        consistency=images.consistency,
        init=InitConfig(diffusion=base.output),
    )


def video_apt(place: Place = Place()) -> RunConfig:
    """Stage 2 on clips; the discriminator starts again from the diffusion weights.

    G starts from the distilled video model. (The paper starts it from the image stage's
    average, which can be done where the distilled model already knew videos; the demo's
    two models have latents of different kinds.)
    """
    distilled = video_consistency(place)
    return replace(
        distilled,
        method="apt",
        output=place.run("videos/apt"),
        iterations=place.updates(150),
        save_every=50,
        optimizer=replace(image_apt(place).optimizer, lr=4e-5, warmup=30),
        apt=replace(
            image_apt(place).apt,
            ar1_sigma=0.1,
            discriminator_lr=2e-4,
            discriminator_warmup=10,
            head_lr_scale=3.0,
        ),
        init=InitConfig(generator=distilled.output, diffusion=distilled.init.diffusion),
    )
