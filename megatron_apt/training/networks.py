"""The networks of a run with optimisers and averages, and their state in checkpoints."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_apt.checkpoint import store
from megatron_apt.methods.base import Role
from megatron_apt.methods.registry import METHODS
from megatron_apt.models.fp8 import Fp8State
from megatron_apt.models.parameters import declared
from megatron_apt.models.stages import WHOLE, Cut, Staged
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.training.optimizers import AdamW, Ema, RMSProp, learning_rate, make_optimizer
from megatron_apt.training.sharded import ShardedParameters


class Network:
    """One role at run time, as far as this rank holds it: module, and if that trains: its
    shards, optimiser and average.
    """

    def __init__(self, name: str, role: Role, mesh: Mesh, cut: Cut = WHOLE):
        self.name, self.role, self.mesh = name, role, mesh
        self.module: Staged = role.build(cut)
        self.shards: ShardedParameters | None = None
        self.optimizer: RMSProp | AdamW | None = None
        self.ema: Ema | None = None
        self.updates = 0
        self.bad: list[str] = []  # parameters whose gradient was not finite at an update
        self._snapshot: dict[str, dict[str, Tensor]] = {}  # by prefix and parameter
        self.source = ""  # checkpoint its weights came from, pinned so that a resume takes the same ones
        for parameter_name, parameter in self.module.named_parameters():
            parameter.requires_grad_(role.trained(parameter_name, parameter))
        if role.optimizer is not None and any(p.requires_grad for p in self.module.parameters()):
            self.shards = ShardedParameters(self.module, mesh, role.optimizer, role.lr_scale)
            self.optimizer = make_optimizer(self.shards, role.optimizer)
        self.fp8 = Fp8State(self.module, mesh, trains=self.shards is not None)

    def start(self, source: str = "") -> None:
        """Takes the role's starting weights (or those of `source`), then begins the average from them."""
        source = source or self.role.source
        if source:
            self.source = load_weights(source, self.module.get_submodule(self.role.target), self.mesh, self)
        self.fp8.start()
        self.begin_average()

    @property
    def trained(self) -> ShardedParameters:
        """The shards of a network that trains."""
        assert self.shards is not None
        return self.shards

    def begin_average(self) -> None:
        if self.role.ema and self.shards is not None and self.role.optimizer is not None:
            self.ema = Ema(self.shards, self.role.optimizer.ema)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """Context of one microbatch's backward passes; the last one lets finished
        gradients go to the other ranks.
        """
        return self.shards.accumulating(last) if self.shards is not None else contextlib.nullcontext()

    def start_reduction(self) -> None:
        """This update's gradients are complete."""
        if self.shards is not None:
            self.shards.start_reduction()

    def update(self, total_updates: int) -> tuple[float, float]:
        """One optimiser step from the accumulated gradients; returns their sum of squares
        over this pipeline stage, and the learning rate.

        Where that sum is NaN, a gradient of the stage is not finite and nothing is
        changed. Other stages have gone on by the time they hear of it: waiting for each
        other here would empty the pipeline.
        """
        settings = self.role.optimizer
        assert settings is not None  # a role without one has no phase that updates it
        lr = learning_rate(settings, settings.lr, self.updates, total_updates)
        square = 0.0
        if self.shards is not None and self.optimizer is not None:
            self.shards.reduce_gradients()
            square = self.shards.grad_square()
            if square != square:
                self.bad = self.bad or self.shards.bad_gradients()
                return square, lr
            self.optimizer.step(lr, self.ema)
            self.shards.gather()
            self.shards.zero_grad()
            self.fp8.step()
        self.updates += 1
        return square, lr

    def _buffers(self) -> dict[str, Tensor]:
        """Every buffer laid out like the shard, by the prefix its tensors have in a checkpoint."""
        if self.shards is None or self.optimizer is None:
            return {}
        buffers = {"": self.shards.master} | {
            f"optimizer.{key}.": value for key, value in self.optimizer.state.items()
        }
        return buffers | ({"ema.": self.ema.average} if self.ema is not None else {})

    def _frozen(self) -> dict[str, nn.Parameter]:
        trained = set(self.shards.names) if self.shards is not None else ()
        return {name: p for name, p in self.module.named_parameters() if name not in trained}

    def _host_memory(self, prefix: str, buffer: Tensor) -> dict[str, Tensor]:
        """Room for the parameters this rank owns, as they are in one of the buffers; the
        same at every call.

        Fresh pages cost several times the copy into them, pinned ones far more. Each has
        its own storage, because Megatron-Core copies views again.
        """
        if prefix not in self._snapshot:
            shards = self.trained
            owned = [(shards.names[i], shards.parameters[i].shape) for i in shards.owned()]
            self._snapshot[prefix] = {
                name: torch.empty(shape, dtype=buffer.dtype, pin_memory=buffer.is_cuda)
                for name, shape in owned
            }
        return self._snapshot[prefix]

    def _sharded(self, prefix: str, owned: dict[str, Tensor]) -> dict:
        parameters = dict(zip(self.trained.names, self.trained.parameters, strict=True))
        keys = {name: f"{self.name}.{prefix}{name}" for name in owned}
        return {
            keys[name]: store.sharded(keys[name], value, parameters[name], self.mesh, replica=0)
            for name, value in owned.items()
        }

    def sharded_state(self) -> dict:
        """Every tensor of this network's state, for a checkpoint: a snapshot in host
        memory, each parameter on the one rank that writes it.

        The next call writes into the same memory.
        """
        if self.role.optimizer is None:
            return {}
        state = {}
        for prefix, buffer in self._buffers().items():
            memory = self._host_memory(prefix, buffer)
            self.trained.gather_owned(buffer, memory)
            state |= self._sharded(prefix, memory)
        if self.mesh.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        if self.mesh.dp_cp.rank == 0:  # what does not train does not change, but a checkpoint is whole
            for name, p in self._frozen().items():
                key = f"{self.name}.{name}"
                state[key] = store.sharded(key, p.detach().cpu(), p, self.mesh, replica=0)
            state |= self._sharded_scales()
        return state

    def _sharded_scales(self) -> dict:
        keys = {f"{self.name}.{name}": value for name, value in self.fp8.tensors().items()}
        return {key: store.replicated(key, value.cpu(), self.mesh) for key, value in keys.items()}

    @torch.no_grad()
    def restore(self, folder: Path, updates: int, source: str) -> None:
        """Puts back a state written from `sharded_state`, on any mesh. A network that
        does not train comes from `source` again.
        """
        if self.role.optimizer is None:
            self.start(source)
            return
        self.source = source
        self.begin_average()
        stored = store.Stored(folder)
        for prefix, buffer in self._buffers().items():
            memory = self._host_memory(prefix, buffer)
            loaded = store.load(stored, self._sharded(prefix, memory))
            self.trained.scatter_owned(
                {name: loaded[f"{self.name}.{prefix}{name}"].to(buffer.device) for name in memory}, buffer
            )
        frozen = {f"{self.name}.{name}": p for name, p in self._frozen().items()}
        wanted = {
            key: store.sharded(key, torch.empty_like(p, device="cpu"), p, self.mesh, self.mesh.dp_cp.rank)
            for key, p in frozen.items()
        }
        if wanted:
            for key, value in store.load(stored, wanted).items():
                frozen[key].copy_(value)
        scales = self._sharded_scales()
        if scales:
            loaded = store.load(stored, scales)
            for name, value in self.fp8.tensors().items():
                value.copy_(loaded[f"{self.name}.{name}"])
        self.updates = updates
        if self.shards is not None:
            self.shards.publish()
        if isinstance(self.optimizer, AdamW):
            self.optimizer.set_steps(updates)


@torch.no_grad()
def load_weights(source: str, module: nn.Module, mesh: Mesh, network: Network | None = None) -> str:
    """Fills a module with the generator of a checkpoint: `path`, or `path:ema` or
    `path:raw` (default: ema where there is one).

    Args:
        source: a checkpoint or run folder.
        module: a backbone, or a part of one (a discriminator's backbone).
        network: the one that owns the module, whose masters then take the same weights.

    Returns:
        What was loaded, in full: `folder:kind`.

    Raises:
        CheckpointError: not there, or of another shape.
    """
    path, _, kind = source.rpartition(":") if source.endswith((":ema", ":raw")) else (source, "", "")
    folder = store.resolve(path)
    state = store.read_state(folder)
    kind = kind or ("ema" if state["ema"] else "raw")
    role = METHODS[state["config"]["method"]].sampled
    store.verify(folder, mesh)
    stored, keys, wanted = store.Stored(folder), {}, {}
    for name, p in module.named_parameters():
        keys[name] = f"{role}.ema.{name}" if kind == "ema" and not declared(p).fixed else f"{role}.{name}"
        wanted[name] = p
    shards = network.shards if network is not None else None
    names = {id(p): name for name, p in zip(shards.names, shards.parameters, strict=True)} if shards else {}
    for part in _parts(wanted, 2**28):
        room = {
            name: torch.empty_like(p, dtype=torch.promote_types(p.dtype, torch.float32), device="cpu")
            for name, p in part.items()
        }
        loaded = store.load(
            stored,
            {
                keys[name]: store.sharded(keys[name], room[name], p, mesh, mesh.dp_cp.rank)
                for name, p in part.items()
            },
        )
        for name, p in part.items():
            p.copy_(loaded[keys[name]])
            if shards is not None and id(p) in names:
                shards.set_master(names[id(p)], loaded[keys[name]])
    return f"{folder}:{kind}"


def _parts(parameters: dict[str, nn.Parameter], bytes_at_once: float) -> Iterator[dict[str, nn.Parameter]]:
    """Parameters in groups of about so many bytes in fp32."""
    part: dict[str, nn.Parameter] = {}
    for name, p in parameters.items():
        part[name] = p
        if 4 * sum(q.numel() for q in part.values()) >= bytes_at_once:
            yield part
            part = {}
    if part:
        yield part
