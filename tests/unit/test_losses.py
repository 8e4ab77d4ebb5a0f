"""Losses against values worked out by hand and against autograd of their definitions in float64."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_apt.conventions import interpolate, one_step_sample, predict_sample, shift, velocity_target
from megatron_apt.methods import losses
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.build import build_method
from megatron_apt.models.discriminator import Discriminator
from support.parity import compare_exactly, iterations, problem
from support.problems import IMAGES, build, gradient_of, microbatch, model_config, run_config, run_phase

LOG2 = math.log(2.0)


def test_non_saturating_by_hand():
    logit = torch.tensor([0.0, 2.0, -3.0], dtype=torch.float64)
    real = [LOG2, math.log(1 + math.exp(-2)), math.log(1 + math.exp(3))]
    fake = [LOG2, math.log(1 + math.exp(2)), math.log(1 + math.exp(-3))]
    assert losses.non_saturating_d_real(logit).tolist() == pytest.approx(real, rel=1e-12)
    assert losses.non_saturating_d_fake(logit).tolist() == pytest.approx(fake, rel=1e-12)
    assert losses.non_saturating_g(logit).tolist() == pytest.approx(real, rel=1e-12)


def test_non_saturating_does_not_overflow_where_log_sigmoid_would():
    logit = torch.tensor([-500.0, 500.0], requires_grad=True)
    loss = losses.non_saturating_d_real(logit)
    loss.sum().backward()
    assert loss.tolist() == [500.0, 0.0]
    assert logit.grad.tolist() == [-1.0, 0.0]


def test_hinge_by_hand():
    logit = torch.tensor([0.25, 2.0, -3.0])
    assert losses.hinge_d_real(logit).tolist() == [0.75, 0.0, 4.0]
    assert losses.hinge_d_fake(logit).tolist() == [1.25, 3.0, 0.0]
    assert losses.hinge_g(logit).tolist() == [-0.25, -2.0, 3.0]


def test_relativistic_by_hand():
    real, fake = torch.tensor([1.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    assert float(losses.relativistic_d(real, fake)) == pytest.approx(math.log(1 + math.exp(-0.5)), rel=1e-12)
    assert float(losses.relativistic_g(real, fake)) == pytest.approx(math.log(1 + math.exp(0.5)), rel=1e-12)


def test_approximate_r1_flows_through_both_terms():
    a, b = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.3, 0.1))
    losses.approximate_r1(a, b).sum().backward()
    assert float(a.grad) == pytest.approx(0.4, rel=1e-12)
    assert float(b.grad) == pytest.approx(-0.4, rel=1e-12)


def test_squared_error_of_bf16_is_computed_in_fp32():
    a = torch.tensor([256.0, 1.0], dtype=torch.bfloat16)
    b = torch.tensor([255.0, 1.0078125], dtype=torch.bfloat16)
    error = losses.squared_error(a, b)
    assert error.dtype == torch.float32
    assert error.tolist() == [1.0, 0.0078125**2]


def test_conventions_agree_with_each_other():
    x, z = torch.randn(2, 5, dtype=torch.float64).unbind()
    t = torch.tensor(0.3, dtype=torch.float64)
    v = velocity_target(x, z)
    assert torch.allclose(predict_sample(interpolate(x, z, t), v, t), x, atol=1e-15)
    assert torch.equal(
        one_step_sample(z, v), predict_sample(interpolate(x, z, torch.ones(())), v, torch.ones(()))
    )


def test_shift_of_the_unit_interval_is_not_the_collapse_case():
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert shift(t, 1.0).tolist() == t.tolist()
    assert shift(t, 12.0).tolist() == pytest.approx(
        [0.0, 12 * 0.25 / (1 + 11 * 0.25), 12 * 0.5 / 6.5, 9 / 9.25, 1.0], rel=1e-12
    )
    # What the same formula gives on a scale of 0..1000: nearly every t is 1.09, that is, t = 0.
    wrong = shift(torch.tensor([100.0, 500.0, 900.0]), 12.0) / 1000
    assert wrong.max() < 0.0011


def test_consistency_function_is_the_identity_at_zero():
    x = torch.randn(7)
    assert torch.equal(predict_sample(x, torch.randn(7) * 1e6, torch.zeros(())), x)


@pytest.mark.parametrize("loss", ["non_saturating", "hinge", "relativistic"])
def test_d_phase_equals_the_written_formula(mesh, loss):
    """The D phase's gradient against autograd of L_D = mean f(D(x)) + mean f(D(x_hat)) +
    lambda mean (D(x) - D(x + sigma n))^2 (+ aR2).
    """
    apt = AptConfig(
        loss=loss, ar1_lambda=3.0, ar1_sigma=0.2, ar2_lambda=2.0, ar2_sigma=0.1, timestep_shift=3.0
    )
    config = run_config(model=model_config(dtype="float64"), apt=apt)
    method, networks, executor = build(config, mesh)
    phase = method.phases[1]
    batch = microbatch(mesh, IMAGES, config.model).for_phase("d")
    run_phase(executor, phase, [batch])
    network = networks["discriminator"]
    ours = gradient_of(network)
    network.shards.zero_grad()

    d: Discriminator = networks["discriminator"].module
    g = networks["generator"].module
    z, layout = batch.noise("z"), batch.layout
    with torch.no_grad():
        fake = z - g(z, batch.times(1.0), batch.condition, layout)
    label = "t_pair" if loss == "relativistic" else "t_real"
    t_real = shift(batch.uniform(label), 3.0)
    t_fake = t_real if loss == "relativistic" else shift(batch.uniform("t_fake"), 3.0)
    on_real, on_noisy = (
        d(x, t_real, batch.condition, layout) for x in (batch.x, batch.x + 0.2 * batch.noise("ar1"))
    )
    on_fake, on_noisy_fake = (
        d(x, t_fake, batch.condition, layout) for x in (fake, fake + 0.1 * batch.noise("ar2"))
    )
    adversarial = {
        "non_saturating": -torch.sigmoid(on_real).log() - (1 - torch.sigmoid(on_fake)).log(),
        "hinge": torch.clamp(1 - on_real, min=0) + torch.clamp(1 + on_fake, min=0),
        "relativistic": -torch.sigmoid(on_real - on_fake).log(),
    }[loss]
    total = (
        adversarial.mean()
        + 3.0 * ((on_real - on_noisy) ** 2).mean()
        + 2.0 * ((on_fake - on_noisy_fake) ** 2).mean()
    )
    total.backward()
    assert torch.allclose(ours, gradient_of(network), rtol=1e-9, atol=1e-13)


def test_g_phase_equals_the_written_formula(mesh):
    config = run_config(model=model_config(dtype="float64"), apt=AptConfig(timestep_shift=12.0))
    method, networks, executor = build(config, mesh)
    batch = microbatch(mesh, IMAGES, config.model).for_phase("g")
    run_phase(executor, method.phases[0], [batch])
    network = networks["generator"]
    ours = gradient_of(network)
    network.shards.zero_grad()
    z, layout = batch.noise("z"), batch.layout
    fake = z - networks["generator"].module(z, batch.times(1.0), batch.condition, layout)
    logit = networks["discriminator"].module(
        fake, shift(batch.uniform("t_fake"), 12.0), batch.condition, layout
    )
    (-torch.sigmoid(logit).log()).mean().backward()
    assert torch.allclose(ours, gradient_of(network), rtol=1e-9, atol=1e-13)


def test_approximate_r1_points_where_exact_r1_points(mesh):
    """For small sigma, the mean gradient of aR1 / sigma^2 over many n aligns with the
    gradient of E ||grad_x D||^2: cosine > 0.95.
    """
    config = run_config(model=model_config(dtype="float64", width=24))
    _, networks, _ = build(config, mesh)
    network = networks["discriminator"]
    d = network.module
    sigma, draws, together = 1e-3, 256, 32
    batch, many = (
        microbatch(mesh, IMAGES[:1], config.model, (3,), global_batch=1, rows=(0,) * n).for_phase("d")
        for n in (1, together)
    )
    t, layout = batch.times(0.5), batch.layout

    x = batch.x.clone().requires_grad_(True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # twice differentiable
        (gradient,) = torch.autograd.grad(
            _plain_rms(lambda: d(x, t, batch.condition, layout)).sum(), x, create_graph=True
        )
        exact = gradient.square().sum()
        _plain_rms(exact.backward)
    exact_direction = gradient_of(network)
    network.shards.zero_grad()

    estimates = []
    for first in range(0, draws, together):
        noise = torch.cat([batch.noise(f"n{k}") for k in range(first, first + together)])
        logits = (
            d(x, many.times(0.5), many.condition, many.layout) for x in (many.x, many.x + sigma * noise)
        )
        penalties = losses.approximate_r1(*logits) / sigma**2
        penalties.sum().backward()
        estimates += penalties.tolist()
    # Each penalty is ||grad||^2 times a chi-square of one degree of freedom: its mean
    # over 256 draws is within 30 % at more than 3 sigma.
    assert sum(estimates) / draws == pytest.approx(float(exact), rel=0.3)
    cosine = torch.dot(gradient_of(network), exact_direction) / (
        gradient_of(network).norm() * exact_direction.norm()
    )
    assert cosine > 0.95


def _plain_rms(call):
    """Runs `call` with the twice differentiable RMSNorm in place of the one with a backward of its own."""
    from megatron_apt.kernels import learnable_query_pooling, qk_norm_rope
    from megatron_apt.kernels.rms_norm import rms_norm, rms_norm_reference
    from megatron_apt.models import backbone

    users = (backbone, qk_norm_rope, learnable_query_pooling)
    for module in users:
        module.rms_norm = rms_norm_reference
    try:
        return call()
    finally:
        for module in users:
            module.rms_norm = rms_norm


def test_without_guidance_the_teacher_runs_once_to_the_same_end(mesh):
    """Guidance of exactly 1 leaves the negative prompt out; of next to 1 it is there and weighs nothing."""
    base = problem("consistency")
    once, twice = (
        replace(base, consistency=replace(base.consistency, guidance_scale=scale))
        for scale in (1.0, 1.0 + 1e-12)
    )
    copies = [build_method(config, mesh).phases[0].branches[0].segments[0].copies for config in (once, twice)]
    assert copies == [1, 2]
    compare_exactly(iterations(mesh, once, "mixed", count=1), iterations(mesh, twice, "mixed", count=1))
