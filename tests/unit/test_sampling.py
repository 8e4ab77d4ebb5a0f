"""Samplers against their formulas, on a network with known output."""

import pytest
import torch

from megatron_apt.conventions import shift
from megatron_apt.models.condition import Condition
from megatron_apt.sample.sampler import Sampler, sample_noise
from support.problems import build, model_config, run_config


@pytest.fixture
def sampler(mesh):
    model = model_config()
    _, networks, _ = build(run_config("flow", model=model), mesh)
    texts = [torch.randn(3, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    return Sampler(
        networks["generator"].module,
        mesh,
        Condition.pack(texts),
        Condition.pack([torch.ones(3, 8)]).repeat(2),
    )


Z = sample_noise(0, torch.arange(2), (4, 2, 4, 8))


def test_one_euler_step_is_z_minus_v(sampler):
    v = sampler.velocity(Z, 1.0)
    assert torch.equal(sampler.one_step(Z), Z - v)
    assert torch.equal(sampler.euler(Z, 1), Z + (0.0 - 1.0) * v)


def test_euler_follows_its_grid(sampler):
    x = Z
    for a, b in ((1.0, shift(0.5, 3.0)), (shift(0.5, 3.0), 0.0)):
        x = x + (b - a) * sampler.velocity(x, a)
    assert torch.allclose(sampler.euler(Z, 2, s=3.0), x, atol=1e-6)


def test_guidance_moves_away_from_the_negative(sampler):
    conditional = sampler.velocity(Z, 0.7)
    negative = Sampler(sampler.model, sampler.mesh, sampler.negative, sampler.negative).velocity(Z, 0.7)
    assert not torch.allclose(conditional, negative, atol=1e-4)
    assert torch.allclose(
        sampler.velocity(Z, 0.7, 7.5), negative + 7.5 * (conditional - negative), rtol=1e-4, atol=1e-5
    )


def test_two_steps_follow_the_paper(sampler):
    renoise = sample_noise(1, torch.arange(2), (4, 2, 4, 8))
    x1 = Z - sampler.velocity(Z, 1.0)
    x_t = 0.5 * x1 + 0.5 * renoise
    assert torch.allclose(
        sampler.two_steps(Z, renoise, 0.5), x_t - 0.5 * sampler.velocity(x_t, 0.5), atol=1e-6
    )


def test_noise_belongs_to_the_sample_not_to_the_batch():
    assert torch.equal(sample_noise(0, torch.tensor([1]), (4, 2, 4, 8))[0], Z[1])
    assert not torch.equal(sample_noise(1, torch.tensor([1]), (4, 2, 4, 8))[0], Z[1])
