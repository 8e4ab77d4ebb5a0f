"""Training runs on the encoded digits, and what is compared of two of them."""

from dataclasses import replace
from pathlib import Path

import torch

from megatron_apt.config import DataConfig, OptimizerConfig, ParallelConfig, RunConfig
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.training.log import read_rows
from megatron_apt.training.train import Trainer
from support.problems import model_config

# The first RMSProp steps are lr * sign(g): a gradient of rounding size would move a
# weight as far as any other. A large eps makes the step smooth in g, so that whole
# updates can be compared at 1e-8.
SMOOTH = OptimizerConfig(kind="rmsprop", lr=1e-3, eps=1e-2, ema=0.9)


def config(datasets, output, method="apt", **changes) -> RunConfig:
    base = RunConfig(
        method=method,
        output=str(output),
        iterations=6,
        global_batch=8,
        micro_batch=4,
        model=model_config(latent_channels=4),
        data=DataConfig(
            shards=(str(datasets / "images"), str(datasets / "videos")),
            weights=(1, 1),
            text_length=5,
            block=4,
        ),
        optimizer=OptimizerConfig(kind="rmsprop" if method == "apt" else "adamw", lr=1e-3, ema=0.9),
        apt=AptConfig(ar1_lambda=10.0, ar1_sigma=0.1),
        tensorboard=False,
    )
    return replace(base, **changes)


def rows(output) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(Path(output) / "log.jsonl")]


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        key: tensor.data.clone()
        for network in trainer.networks.values()
        for key, tensor in network.sharded_state().items()
    }


PP2 = ParallelConfig(pp=2)


def deep_run(datasets, output, **changes):
    return config(
        datasets,
        output,
        model=model_config(latent_channels=4, depth=4),
        micro_batch=2,
        parallel=PP2,
        **changes,
    )
