"""Stage 0: flow matching. E || v(x_t, t, c) - (z - x) ||^2 with logit-normal t, one t per
sample (Esser et al. 2024).
"""

import torch

from megatron_apt.config import RunConfig
from megatron_apt.conventions import shift, velocity_target
from megatron_apt.data.microbatch import Microbatch, dropped
from megatron_apt.methods import losses
from megatron_apt.methods.base import Branch, Inputs, Method, Phase, Role, Segment
from megatron_apt.models import parameters
from megatron_apt.models.backbone import Backbone
from megatron_apt.models.condition import Condition
from megatron_apt.models.families import build_backbone
from megatron_apt.models.stages import Cut
from megatron_apt.parallel.mesh import Mesh


def build_generator(config: RunConfig, mesh: Mesh, cut: Cut) -> Backbone:
    """A diffusion transformer with weights drawn from the run's seed."""
    model = build_backbone(config.model, mesh, cut=cut)
    parameters.initialise(model, mesh, config.seed)
    return model


def generator(config: RunConfig, mesh: Mesh, source: str) -> Role:
    """The role that is trained, averaged, sampled and exported."""
    return Role(
        lambda cut: build_generator(config, mesh, cut),
        config.model.depth,
        source,
        optimizer=config.optimizer,
        ema=config.optimizer.ema > 0,
    )


def method(config: RunConfig, mesh: Mesh) -> Method:
    """One role, one phase, one branch."""
    flow = config.flow

    def condition(batch: Microbatch) -> Condition:
        return dropped(batch, flow.condition_dropout, "dropout")

    def feed(batch: Microbatch, _) -> Inputs:
        t = shift(torch.sigmoid(flow.logit_mean + flow.logit_std * batch.normal("t")), flow.shift)
        return batch.interpolated("z", t), t

    def loss(batch: Microbatch, outputs):
        value = batch.token_mean(losses.squared_error(outputs[0], velocity_target(batch.x, batch.noise("z"))))
        return value, {"loss": value.detach()}

    branch = Branch("flow", (Segment("generator", "full", condition, feed),), loss)
    return Method(
        {"generator": generator(config, mesh, config.init.generator)},
        (Phase("flow", (branch,), updates="generator"),),
    )
