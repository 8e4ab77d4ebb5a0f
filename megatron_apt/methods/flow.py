"""Stage 0: flow matching. E || v(x_t, t, c) - (z - x) ||^2 with logit-normal t, one t per sample (Esser et al. 2024)."""

import torch

from megatron_apt.config import RunConfig
from megatron_apt.conventions import interpolate, shift, velocity_target
from megatron_apt.data.microbatch import Microbatch, dropped
from megatron_apt.methods import losses
from megatron_apt.methods.base import Branch, Inputs, Method, Phase, Role, Segment
from megatron_apt.models import parameters
from megatron_apt.models.mmdit import MMDiT
from megatron_apt.parallel.mesh import Mesh


def build_generator(config: RunConfig, mesh: Mesh) -> MMDiT:
    """A diffusion transformer with weights drawn from the run's seed."""
    model = MMDiT(config.model, mesh)
    parameters.initialise(model, mesh, config.seed)
    return model


def method(config: RunConfig, mesh: Mesh) -> Method:
    """One role, one phase, one branch."""
    flow = config.flow

    def feed(batch: Microbatch, _) -> Inputs:
        t = shift(torch.sigmoid(flow.logit_mean + flow.logit_std * batch.normal("t")), flow.shift)
        condition = dropped(batch, flow.condition_dropout, "dropout")
        layout = batch.layout_for(condition)
        return Inputs(interpolate(batch.x, batch.noise("z"), layout.expand(t)), t, condition, layout)

    def loss(batch: Microbatch, outputs):
        value = batch.token_mean(losses.squared_error(outputs[0], velocity_target(batch.x, batch.noise("z"))))
        return value, {"loss": value.detach()}

    generator = Role(lambda: build_generator(config, mesh), source=config.init.generator, optimizer=config.optimizer, ema=config.optimizer.ema > 0)
    branch = Branch("flow", (Segment("generator", "full", feed),), loss)
    return Method({"generator": generator}, (Phase("flow", (branch,), updates="generator"),))
