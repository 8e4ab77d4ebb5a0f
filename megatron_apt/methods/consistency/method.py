"""Stage 1: discrete-time consistency distillation with guidance folded in.

Song et al. 2023; APT paper, section 3.2. With f(x_t, t) = x_t - t v(x_t, t), so that
f(x, 0) = x by construction:
    L     = E || f_student(x_t, t) - sg f_student(x_s, s) ||^2
    x_s   = x_t + (s - t) v_cfg(x_t, t)               one Euler step of the teacher
    v_cfg = v(negative) + w (v(c) - v(negative))
    t -> s are neighbours on a shifted grid.
"""

import torch

from megatron_apt.config import RunConfig
from megatron_apt.conventions import predict_sample, shift
from megatron_apt.data.microbatch import Microbatch
from megatron_apt.methods import losses
from megatron_apt.methods.base import Branch, Inputs, Method, Phase, Role, Segment
from megatron_apt.methods.roles import build_generator, generator
from megatron_apt.models.condition import Condition
from megatron_apt.parallel.mesh import Mesh


def grid_times(u: torch.Tensor, steps: int, s: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbouring times (t_n, t_{n-1}) of the shifted grid for uniform u in (0, 1): n
    uniform on 1..steps, so t_steps = 1 and t_0 = 0.
    """
    n = (u * steps).floor().clamp(max=steps - 1) + 1
    return shift(n / steps, s), shift((n - 1) / steps, s)


def guided(stacked: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance of a stacked (conditional | negative) velocity."""
    conditional, negative = stacked.chunk(2)
    return negative + scale * (conditional - negative)


def method(config: RunConfig, mesh: Mesh) -> Method:
    """Student and frozen teacher; the chain is teacher -> target, beside it the student."""
    c = config.consistency
    folds_in = c.guidance_scale != 1.0  # teachers that hold guidance already are run once

    def noisy(batch: Microbatch):
        t, s = grid_times(batch.uniform("t"), c.steps, c.shift)
        return batch.interpolated("z", t), t, s

    def texts(batch: Microbatch) -> Condition:
        return batch.condition

    def guidance_texts(batch: Microbatch) -> Condition:
        return batch.condition.join(batch.negative) if folds_in else batch.condition

    def feed_teacher(batch: Microbatch, _) -> Inputs:
        x_t, t = feed_student(batch, _)
        return (torch.cat((x_t, x_t)), torch.cat((t, t))) if folds_in else (x_t, t)

    def stepped(batch: Microbatch, outputs):
        x_t, t, s = noisy(batch)
        v = guided(outputs[0], c.guidance_scale) if folds_in else outputs[0]
        return x_t + batch.layout.expand(s - t) * v, s

    def feed_student(batch: Microbatch, _) -> Inputs:
        x_t, t, _s = noisy(batch)
        return x_t, t

    def loss(batch: Microbatch, outputs):
        x_t, t, _s = noisy(batch)
        x_s, s = stepped(batch, outputs)
        target = predict_sample(x_s, outputs[1], batch.layout.expand(s))
        value = batch.token_mean(
            losses.squared_error(predict_sample(x_t, outputs[2], batch.layout.expand(t)), target)
        )
        return value, {"loss": value.detach()}

    roles = {
        "generator": generator(config, mesh, config.init.generator or config.init.diffusion),
        "teacher": Role(
            lambda cut: build_generator(config, mesh, cut), config.model.depth, config.init.diffusion
        ),
    }
    teacher = Segment("teacher", "none", guidance_texts, feed_teacher, copies=1 + folds_in)
    target = Segment("generator", "none", texts, stepped, reads=(0,))
    student = Segment("generator", "full", texts, feed_student)
    return Method(
        roles,
        (
            Phase(
                "consistency",
                (Branch("distil", (teacher, target, student), loss, reads=(0, 1)),),
                updates="generator",
            ),
        ),
    )
