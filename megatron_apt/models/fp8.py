"""FP8 matrix products of Transformer Engine in two networks that train each other. Not
run so far: there was no GPU with Transformer Engine.

Which products: those of the blocks' linear layers, except the first and last few blocks.
Embeddings, modulation, query heads, final layer and logit stay as they are: they are
small, and errors there reach every token or the loss directly.

Scales belong to a network's VERSION, as its weights do. Transformer Engine updates
delayed scales at the end of each autocast, for every layer of the process, with a
collective. With two networks that would age one's history while the other runs, make
scales depend on the schedule, and block where data-parallel ranks run different numbers
of microbatches. So its update is kept out (an autocast that claims to be captured
registers no layer), maxima gather in every forward and backward pass, and `Fp8State.step`
makes new scales from them where a schedule has this network's STEP: any schedule and mesh
gives the same ones, a recomputed block meets the scales of its first pass, and a network
that is frozen in a branch adds its maxima to its own next version. FP8 copies of weights
are likewise made once for each version and used by every pass through it.
"""

import contextlib
import math
from collections.abc import Generator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_apt.models.config import Fp8Config
from megatron_apt.parallel.mesh import Mesh

# Gradients of a loss averaged over a batch are small, and with a scale of 1 would all be
# zero in the first iteration, which then measures nothing in the layers below. With this
# one maxima from 1e-9 to 5e-2 survive until they have been measured.
_FIRST_GRADIENT_SCALE = 2.0**20
_LARGEST = {"scaling_fwd": 448.0, "scaling_bwd": 57344.0}  # of E4M3 and E5M2
_WEIGHT = 1  # place among input, weight and output


def require(config: Fp8Config, device: torch.device) -> None:
    """Stops where this FP8 recipe cannot run.

    Raises:
        ValueError: no GPU, no Transformer Engine, or a chip without this format, with the
            remedy.
    """
    where, remedy = f"model.fp8.recipe={config.recipe!r}", 'use model.fp8.recipe="none" (bf16)'
    if device.type != "cuda":
        raise ValueError(
            f"{where} needs a CUDA GPU with FP8 (Hopper or newer); this is {device.type}: {remedy}"
        )
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:
        raise ValueError(
            f"{where} needs Transformer Engine, which is not installed: `pip install megatron_apt[gpu]`, or "
            f"{remedy}"
        )
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager as Manager

    check = {"mxfp8": "is_mxfp8_available", "blockwise": "is_fp8_block_scaling_available"}.get(
        config.recipe, "is_fp8_available"
    )
    if not hasattr(Manager, check):
        raise ValueError(f"{where}: this Transformer Engine is too old to have it; upgrade it, or {remedy}")
    available, reason = getattr(Manager, check)()
    if not available:
        raise ValueError(
            f"{where}: {torch.cuda.get_device_name(device)} cannot ({reason}); use another recipe, or "
            f"{remedy}"
        )


def _recipe(config: Fp8Config, name: str) -> Any:
    from transformer_engine.common import recipe

    return {
        "delayed": lambda: recipe.DelayedScaling(
            margin=config.margin, amax_history_len=config.history, amax_compute_algo="max"
        ),
        "current": lambda: recipe.Float8CurrentScaling(),
        "blockwise": lambda: recipe.Float8BlockScaling(),
        "mxfp8": lambda: recipe.MXFP8BlockScaling(),
    }[name]()


class Fp8Blocks:
    """Which blocks of one network run in FP8, and how."""

    def __init__(self, config: Fp8Config, depth: int, device: torch.device):
        self.config, self.depth, self.recipe = config, depth, None
        self.off = False
        self.name = config.recipe
        if config.recipe != "none" and device.type != "meta":  # a model on meta is built for its shapes alone
            require(config, device)
            self.recipe = _recipe(config, config.recipe)

    def never_steps(self) -> None:
        """A network without updates has no version that could bring it scales: it
        measures each tensor when it comes.
        """
        if self.name == "delayed" and self.recipe is not None:
            self.name, self.recipe = "current", _recipe(self.config, "current")

    def holds(self, block: int) -> bool:
        return (
            self.recipe is not None and self.config.bf16_first <= block < self.depth - self.config.bf16_last
        )

    def products(self, block: int) -> contextlib.AbstractContextManager:
        """Context of one block's (from 0) passes."""
        if self.off or not self.holds(block):
            return contextlib.nullcontext()
        from transformer_engine import pytorch

        captured = self.name == "delayed"
        if hasattr(pytorch, "autocast"):
            return pytorch.autocast(enabled=True, recipe=self.recipe, _graph=captured)
        # Before Transformer Engine 2.9
        return pytorch.fp8_autocast(enabled=True, fp8_recipe=self.recipe, _graph=captured)


@contextlib.contextmanager
def without(module: nn.Module) -> Generator[None]:
    """Inside, every product has the dtype of the weights: passes that belong to no update
    would leave their maxima to the next version's scales.
    """
    parts = (getattr(network, "fp8", None) for network in module.modules())
    blocks = [part for part in parts if isinstance(part, Fp8Blocks)]
    for part in blocks:
        part.off = True
    try:
        yield
    finally:
        for part in blocks:
            part.off = False


class Fp8State:
    """The FP8 state of one network's layers on this rank: scales and recent maxima of the
    delayed recipe, and copies of weights.
    """

    def __init__(self, module: nn.Module, mesh: Mesh, trains: bool):
        self.mesh, self.layers, self._delayed = mesh, {}, {}
        for prefix, network in module.named_modules():
            if not isinstance(blocks := getattr(network, "fp8", None), Fp8Blocks):
                continue
            if not trains:
                blocks.never_steps()
            for number in (n for n in network.blocks if blocks.holds(int(n))):
                named = network.blocks[number].named_modules(
                    prefix=".".join(filter(None, (prefix, "blocks", number)))
                )
                # Attention has such a state too, and no FP8 products here.
                found = {
                    name: layer
                    for name, layer in named
                    if hasattr(layer, "fp8_meta") and isinstance(getattr(layer, "weight", None), Tensor)
                }
                self.layers |= found
                if blocks.name == "delayed":
                    self._delayed |= found
                    self._begin(blocks, int(number), found)

    @staticmethod
    @torch.no_grad()
    def _begin(blocks: Fp8Blocks, number: int, layers: dict[str, Any]) -> None:
        """Makes the state before the first pass, so that a checkpoint can be read into it."""
        with blocks.products(number):
            for layer in layers.values():
                layer.init_fp8_metadata(num_gemms=1)
                layer.fp8_meta["scaling_bwd"].scale.fill_(_FIRST_GRADIENT_SCALE)

    @torch.no_grad()
    def start(self) -> None:
        """The network has its first weights, whose scales need no pass to be measured.
        Activations begin with a scale of 1.
        """
        if not self._delayed:
            return
        largest = torch.stack([layer.weight.abs().amax().float() for layer in self._delayed.values()])
        if self.mesh.tp.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.mesh.tp.group)
        for layer, value in zip(self._delayed.values(), largest, strict=True):
            state = layer.fp8_meta["scaling_fwd"]
            if 0.0 < value < math.inf:
                state.scale[_WEIGHT] = _LARGEST["scaling_fwd"] / value / 2.0**state.recipe.margin

    @torch.no_grad()
    def step(self) -> None:
        """The network has new weights. The same on every rank of the stage: one maximum
        over all of them decides each scale.
        """
        for layer in self.layers.values():
            # Cleared rather than renewed through is_first_microbatch, which also means
            # "overwrite the weight's gradient": in a pipeline the first pass through a
            # version is often one that no weight gradient follows.
            layer._fp8_workspaces.clear()
        states = [layer.fp8_meta[key] for layer in self._delayed.values() for key in _LARGEST]
        if not states:
            return
        maxima = torch.cat([state.amax_history[0] for state in states])
        if self.mesh.stage.size > 1:
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group=self.mesh.stage.group)
        keys = [key for _ in self._delayed for key in _LARGEST]
        for state, key, part in zip(
            states, keys, maxima.split([len(state.scale) for state in states]), strict=True
        ):
            state.amax_history[0] = part
            largest = state.amax_history.amax(0)
            measured = (largest > 0) & torch.isfinite(largest)
            state.scale.copy_(
                torch.where(measured, _LARGEST[key] / largest / 2.0**state.recipe.margin, state.scale)
            )
            state.amax_history[1:] = state.amax_history[:-1].clone()
            state.amax_history[0] = 0.0

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name; replicated over tensor, context and data parallelism."""
        named = {}
        for name, layer in self._delayed.items():
            for key, short in (("scaling_fwd", "forward"), ("scaling_bwd", "backward")):
                named[f"fp8.{name}.{short}.scale"] = layer.fp8_meta[key].scale
                named[f"fp8.{name}.{short}.maxima"] = layer.fp8_meta[key].amax_history
        return named
