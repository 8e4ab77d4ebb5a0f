"""The networks of a run with their optimisers and averages, and how their state enters and leaves checkpoints."""

from pathlib import Path

import torch
from torch import nn

from megatron_apt.checkpoint import store
from megatron_apt.methods.base import Role
from megatron_apt.optim.flat import FlatParameters
from megatron_apt.optim.optimizers import AdamW, Ema, RMSProp, learning_rate, make_optimizer
from megatron_apt.parallel.mesh import Mesh


class BadGradient(RuntimeError):
    """A gradient is not finite; names the network and the parameter."""


class Network:
    """One role at run time: module, and if it trains: flat buffers, optimiser and average."""

    def __init__(self, name: str, role: Role, mesh: Mesh):
        self.name, self.role, self.mesh = name, role, mesh
        self.module: nn.Module = role.build()
        self.flat: FlatParameters | None = None
        self.optimizer: RMSProp | AdamW | None = None
        self.ema: Ema | None = None
        self.updates = 0
        self.source = ""  # checkpoint its weights came from, pinned so that a resume takes the same ones
        for parameter_name, parameter in self.module.named_parameters():
            parameter.requires_grad_(role.optimizer is not None and role.trains(parameter_name))
        if role.optimizer is not None:
            self.flat = FlatParameters(self.module, mesh, role.lr_scale)
            self.optimizer = make_optimizer(self.flat, role.optimizer)

    def start(self, source: str = "") -> None:
        """Takes the role's starting weights (or those of `source`), then begins the average from them."""
        source = source or self.role.source
        if source:
            self.source = load_weights(source, self.module.get_submodule(self.role.target), self.mesh, self.flat)
        self.begin_average()

    def begin_average(self) -> None:
        if self.role.ema and self.flat is not None:
            self.ema = Ema(self.flat, self.role.optimizer.ema)

    def update(self, total_updates: int) -> dict[str, float]:
        """One optimiser step from the accumulated gradients; returns what to log.

        Raises:
            BadGradient: a gradient is not finite. Weights, optimiser and average are as before.
        """
        self.flat.reduce_gradients()
        norm = self.flat.grad_norm()
        if norm != norm or norm == float("inf"):
            raise BadGradient(f"gradient of {self.name}.{self.flat.first_bad_gradient() or '(a shard on another rank)'} is not finite")
        lr = learning_rate(self.role.optimizer, self.role.optimizer.lr, self.updates, total_updates)
        self.optimizer.step(lr)
        self.flat.publish()
        self.flat.zero_grad()
        self.updates += 1
        if self.ema is not None:
            self.ema.update()
        return {f"{self.name}/grad_norm": norm, f"{self.name}/lr": lr}

    def sharded_state(self) -> dict:
        """Every tensor of this network's state for a checkpoint."""
        if self.flat is None:
            return {}
        buffers = {"": self.flat.master} | {f"optimizer.{key}.": value for key, value in self.optimizer.state.items()}
        if self.ema is not None:
            buffers["ema."] = self.ema.average
        state, flat = {}, self.flat
        for prefix, buffer in buffers.items():
            for name, parameter, view in zip(flat.names, flat.parameters, flat.views(buffer), strict=True):
                key = f"{self.name}.{prefix}{name}"
                state[key] = store.sharded(key, view, parameter, self.mesh)
        trained = set(flat.names)
        for name, parameter in self.module.named_parameters():
            if name not in trained:
                state[f"{self.name}.{name}"] = store.sharded(f"{self.name}.{name}", parameter.data, parameter, self.mesh)
        return state

    @torch.no_grad()
    def restore(self, folder: Path, updates: int, source: str) -> None:
        """Puts back a state written from `sharded_state`, in place. A network that does not train comes from `source` again."""
        if self.flat is None:
            self.start(source)
            return
        self.source = source
        self.begin_average()
        wanted = self.sharded_state()
        targets = {key: tensor.data for key, tensor in wanted.items()}
        for key, value in store.load(folder, wanted).items():
            targets[key].copy_(value)
        self.flat.publish()
        self.updates = updates
        if isinstance(self.optimizer, AdamW):
            self.optimizer.set_steps(updates)


@torch.no_grad()
def load_weights(source: str, module: nn.Module, mesh: Mesh, flat: FlatParameters | None = None) -> str:
    """Fills a module with the generator of a checkpoint: `path`, or `path:ema` or `path:raw` (default: ema where there is one).

    Args:
        source: a checkpoint or run folder.
        module: an MMDiT, or a part of one (a discriminator's backbone).
        flat: buffers of the network that owns the module, whose masters then take the same weights.

    Returns:
        What was loaded, in full: `folder:kind`.

    Raises:
        CheckpointError: not there, or of another shape.
    """
    path, _, kind = source.rpartition(":") if source.endswith((":ema", ":raw")) else (source, "", "")
    folder = store.resolve(path)
    kind = kind or ("ema" if store.read_state(folder)["ema"] else "raw")
    prefix = "generator.ema." if kind == "ema" else "generator."
    wide = {name: torch.empty_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in module.named_parameters()}
    wanted = {prefix + name: store.sharded(prefix + name, wide[name], p, mesh) for name, p in module.named_parameters()}
    loaded = store.load(folder, wanted)
    masters = {id(p): view for p, view in zip(flat.parameters, flat.views(flat.master), strict=True)} if flat else {}
    for name, parameter in module.named_parameters():
        parameter.copy_(loaded[prefix + name])
        if id(parameter) in masters:
            masters[id(parameter)].copy_(loaded[prefix + name])
    return f"{folder}:{kind}"
