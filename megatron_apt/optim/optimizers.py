"""Optimisers over a flat buffer, their learning-rate schedule, and the moving average."""

import math

import torch
from torch import Tensor

from megatron_apt.config import OptimizerConfig
from megatron_apt.optim.flat import FlatParameters


class RMSProp:
    """RMSProp with ONE state per parameter: s <- alpha s + (1 - alpha) g^2;  w <- w - lr g / (sqrt(s) + eps).

    No momentum, no bias correction, no decay: what the paper uses for G and D (section 3.5).
    """

    def __init__(self, flat: FlatParameters, config: OptimizerConfig):
        self.flat, self.config = flat, config
        self.state = {"square": torch.zeros_like(flat.master)}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        square, grad = self.state["square"], self.flat.grad
        square.mul_(self.config.alpha).addcmul_(grad, grad, value=1 - self.config.alpha)
        for group in self.flat.groups:
            part = slice(group.start, group.stop)
            self.flat.master[part].addcdiv_(grad[part], square[part].sqrt().add_(self.config.eps), value=-lr * group.lr_scale)


class AdamW:
    """torch.optim.AdamW on stretches of the flat buffer, its states laid into flat buffers too."""

    def __init__(self, flat: FlatParameters, config: OptimizerConfig):
        self.flat = flat
        self.state = {"mean": torch.zeros_like(flat.master), "square": torch.zeros_like(flat.master)}
        stretches = []
        for group in flat.groups:
            part = slice(group.start, group.stop)
            weights = torch.nn.Parameter(flat.master[part])
            weights.grad = flat.grad[part]
            stretches.append({"params": [weights], "weight_decay": config.weight_decay if group.decays else 0.0, "lr_scale": group.lr_scale})
        self._adamw = torch.optim.AdamW(stretches, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        for group, stretch in zip(flat.groups, self._adamw.param_groups, strict=True):
            part = slice(group.start, group.stop)
            self._adamw.state[stretch["params"][0]] = {
                "step": torch.zeros((), device=flat.master.device),  # where the fused kernel reads it
                "exp_avg": self.state["mean"][part],
                "exp_avg_sq": self.state["square"][part],
            }

    def set_steps(self, steps: int) -> None:
        """Sets the count that bias correction depends on, after a resume."""
        for state in self._adamw.state.values():
            state["step"].fill_(steps)

    def step(self, lr: float) -> None:
        for stretch in self._adamw.param_groups:
            stretch["lr"] = lr * stretch["lr_scale"]
        self._adamw.step()


def make_optimizer(flat: FlatParameters, config: OptimizerConfig) -> RMSProp | AdamW:
    return {"rmsprop": RMSProp, "adamw": AdamW}[config.kind](flat, config)


def learning_rate(config: OptimizerConfig, lr: float, update: int, updates: int) -> float:
    """Learning rate of update number `update` (from 0) of `updates`: linear warm-up, then constant or cosine to zero."""
    warm = min(1.0, (update + 1) / config.warmup) if config.warmup else 1.0
    fall = 0.5 * (1 + math.cos(math.pi * update / max(updates, 1))) if config.decay == "cosine" else 1.0
    return lr * warm * fall


class Ema:
    """Moving average of the masters in fp32: average <- decay * average + (1 - decay) * weights, once per update of the network."""

    def __init__(self, flat: FlatParameters, decay: float):
        self.flat, self.decay = flat, decay
        self.average: Tensor = flat.master.clone()

    @torch.no_grad()
    def update(self) -> None:
        self.average.lerp_(self.flat.master, 1 - self.decay)
