"""Optimisers over a shard, their learning-rate schedule, and the moving average.

A step changes the masters, this rank's part of the weights that the module reads, and the
average.
"""

import math

import torch
from torch import Tensor

from megatron_apt.config import OptimizerConfig
from megatron_apt.kernels.rmsprop_ema import Stretches, rmsprop_ema
from megatron_apt.training.sharded import ShardedParameters

# Buffers of the shard's size that each optimiser keeps
STATES = {"rmsprop": ("square",), "adamw": ("mean", "square")}


class RMSProp:
    """RMSProp with ONE state per parameter: s <- alpha s + (1 - alpha) g^2;  w <- w - lr g / (sqrt(s) + eps).

    No momentum, no bias correction, no decay: what the paper uses for G and D (section
    3.5).
    """

    def __init__(self, shards: ShardedParameters, config: OptimizerConfig):
        self.shards, self.config = shards, config
        self.state = {name: torch.zeros_like(shards.master) for name in STATES["rmsprop"]}
        self._stretches = Stretches(shards.stretches)

    def step(self, lr: float, ema: "Ema | None" = None) -> None:
        average, decay = (ema.average, ema.decay) if ema is not None else (None, 1.0)
        rmsprop_ema(
            self.shards.master,
            self.state["square"],
            average,
            self._stretches,
            lr,
            self.config.alpha,
            self.config.eps,
            decay,
        )


class AdamW:
    """torch.optim.AdamW on the stretches of a shard, its states laid out like the shard."""

    def __init__(self, shards: ShardedParameters, config: OptimizerConfig):
        self.shards = shards
        self.state = {name: torch.zeros_like(shards.master) for name in STATES["adamw"]}
        groups = []
        for stretch in shards.stretches:
            weights = torch.nn.Parameter(shards.master[stretch.part])
            weights.grad = stretch.grad
            groups.append(
                {
                    "params": [weights],
                    "weight_decay": config.weight_decay if stretch.decays else 0.0,
                    "lr_scale": stretch.lr_scale,
                }
            )
        self._adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        for stretch, group in zip(shards.stretches, self._adamw.param_groups, strict=True):
            self._adamw.state[group["params"][0]] = {
                "step": torch.zeros((), device=shards.master.device),  # where the fused kernel reads it
                "exp_avg": self.state["mean"][stretch.part],
                "exp_avg_sq": self.state["square"][stretch.part],
            }

    def set_steps(self, steps: int) -> None:
        """Sets the count that bias correction depends on, after a resume."""
        for state in self._adamw.state.values():
            state["step"].fill_(steps)

    def step(self, lr: float, ema: "Ema | None" = None) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._adamw.step()
        self.shards.write(self.shards.master)
        if ema is not None:
            ema.update()


def make_optimizer(shards: ShardedParameters, config: OptimizerConfig) -> RMSProp | AdamW:
    return {"rmsprop": RMSProp, "adamw": AdamW}[config.kind](shards, config)


def learning_rate(config: OptimizerConfig, lr: float, update: int, updates: int) -> float:
    """Learning rate of update number `update` (from 0) of `updates`: linear warm-up, then
    constant or cosine to zero.
    """
    warm = min(1.0, (update + 1) / config.warmup) if config.warmup else 1.0
    fall = 0.5 * (1 + math.cos(math.pi * update / max(updates, 1))) if config.decay == "cosine" else 1.0
    return lr * warm * fall


class Ema:
    """Moving average of the masters, in their precision and on their shards: average <-
    decay * average + (1 - decay) * weights.

    Once per step of the network's optimiser, which moves it.
    """

    def __init__(self, shards: ShardedParameters, decay: float):
        self.shards, self.decay = shards, decay
        self.average: Tensor = shards.master.clone()

    @torch.no_grad()
    def update(self) -> None:
        self.average.lerp_(self.shards.master, 1 - self.decay)
