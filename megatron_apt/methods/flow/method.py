"""Stage 0: flow matching. E || v(x_t, t, c) - (z - x) ||^2 with logit-normal t, one t per
sample (Esser et al. 2024).
"""

import torch

from megatron_apt.config import RunConfig
from megatron_apt.conventions import shift, velocity_target
from megatron_apt.data.microbatch import Microbatch, dropped
from megatron_apt.methods import losses
from megatron_apt.methods.base import Branch, Inputs, Method, Phase, Segment
from megatron_apt.methods.roles import generator
from megatron_apt.models.condition import Condition
from megatron_apt.parallel.mesh import Mesh


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
