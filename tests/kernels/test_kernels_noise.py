"""The kernels of keyed_noise against its references; in the interpreter without a GPU."""

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megatron_apt.conventions import interpolate
from megatron_apt.kernels import keyed_noise
from megatron_apt.kernels.keyed_noise import (
    derive_key,
    keyed_normal,
    keyed_normal_reference,
    keyed_uniform,
    keyed_uniform_reference,
)
from megatron_apt.kernels.launch import implementation, jit, launch, tl
from megatron_apt.methods.build import build_method
from megatron_apt.parallel.mesh import Axis
from support.kernel_checks import DEVICE, TOLERANCE, difference
from support.problems import IMAGES, MIXED, VIDEOS, microbatch, model_config, run_config

KEYS = [derive_key("a"), 2**63 + 12345, 2**64 - 1, 0, 1, 2**32 - 16]
IDS = [0, 3, 2**31, 2**32 - 1, 2**32, 2**45 + 7]


@jit(do_not_specialize=["key"])
def _words(out, blocks, ids, key, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    words = keyed_noise._block_words(key, tl.load(blocks + i), tl.load(ids + i))
    for j in tl.static_range(4):
        tl.store(out + 4 * i + j, words[j].to(tl.int64))


@pytest.mark.parametrize("key", KEYS)
def test_the_words_of_philox(key):
    blocks = torch.tensor([0, 1, 77, 2**30, 2**32 - 1, 2**32, 2**40 + 5, 2**60], device=DEVICE)
    ids = torch.tensor([*IDS, 5, 2**62], device=DEVICE)
    out = torch.empty(8, 4, dtype=torch.int64, device=DEVICE)
    launch(_words, (1,), out, blocks, ids, keyed_noise._signed(key), BLOCK=8)
    assert torch.equal(out, torch.stack(keyed_noise._philox(key, blocks, ids), dim=-1))


@pytest.mark.parametrize(
    "start, count", [(0, 4), (0, 1), (1, 1), (3, 2), (2, 509), (5, 1024), (2**33 + 3, 30), (0, 0)]
)
@pytest.mark.parametrize("key", KEYS[:3])
def test_slices_of_streams(key, start, count):
    ids = torch.tensor(IDS, device=DEVICE)
    with implementation("kernels"):
        uniform, normal = keyed_uniform(key, ids, count, start), keyed_normal(key, ids, count, start)
    assert torch.equal(uniform, keyed_uniform_reference(key, ids, count, start))
    torch.testing.assert_close(normal, keyed_normal_reference(key, ids, count, start), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    ids = torch.tensor([2, 9], device=DEVICE)
    with implementation("kernels"):
        uniform, normal = keyed_uniform(1, ids, 100, dtype=dtype), keyed_normal(1, ids, 100, dtype=dtype)
    assert uniform.dtype == normal.dtype == dtype
    for got, want in (
        (uniform, keyed_uniform_reference(1, ids, 100)),
        (normal, keyed_normal_reference(1, ids, 100)),
    ):
        torch.testing.assert_close(got.float(), want, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0)


def test_any_cut_of_a_stream_gives_the_whole():
    ids = torch.tensor([4, 8], device=DEVICE)
    cuts = [0, 1, 2, 7, 8, 30, 541, 546, 1200]
    with implementation("kernels"):
        for draw in (keyed_uniform, keyed_normal):
            parts = [draw(9, ids, stop - start, start) for start, stop in itertools.pairwise(cuts)]
            assert torch.equal(torch.cat(parts, 1), draw(9, ids, cuts[-1]))


def test_references_serve_where_triton_is_missing():
    lines = (
        "import sys; sys.modules['triton'] = None; import torch; from megatron_apt.kernels import "
        "modulated_norm, rmsprop_ema, keyed_noise"
    )
    draw = "print(keyed_noise.keyed_normal(5, torch.tensor([1]), 3).tolist())"
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{lines}; {draw}"], capture_output=True, text=True, check=True
    ).stdout
    assert found.strip() == str(keyed_normal_reference(5, torch.tensor([1]), 3).tolist())


def share(mesh, shapes, cp, rank):
    """The samples as one of `cp` context-parallel ranks has them."""
    part = replace(mesh, cp=Axis(cp, rank, None))
    batch = microbatch(part, shapes, model_config()).for_phase("d")
    on = lambda t: t.to(DEVICE)  # noqa: E731
    return replace(batch, x=on(batch.x), positions=on(batch.positions + 2**32))


@pytest.mark.parametrize("cp, rank", [(1, 0), (3, 0), (3, 2)])
@pytest.mark.parametrize("shapes", [IMAGES, VIDEOS, MIXED], ids=["images", "videos", "mixed"])
def test_tokens(mesh, shapes, cp, rank):
    batch = share(mesh, shapes, cp, rank)
    with implementation("reference"):
        want = batch.noise("z")
    with implementation("kernels"):
        got = replace(batch, drawn={}).noise("z")
    assert got.shape == batch.x.shape
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 1, 4), (2, 3, 1)])
def test_patches_of_other_sizes(mesh, patch):
    shape = (3, 4, 6, 8)  # widths that are no powers of two, pairs of the stream in different tokens
    model = replace(model_config(), patch=patch, latent_channels=3)
    batch = microbatch(mesh, (shape,) * 2, model, (3, 3))
    with implementation("kernels"):
        got = batch.noise("z")
    with implementation("reference"):
        want = replace(batch, drawn={}).noise("z")
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", [VIDEOS, MIXED], ids=["videos", "mixed"])
def test_forms_with_noise_in_them(mesh, shapes, dtype):
    batch = share(mesh, shapes, 2, 1)
    batch = replace(batch, x=batch.x.to(dtype))
    t = torch.tensor([0.0, 0.3, 0.7, 1.0], device=DEVICE)
    with implementation("kernels"):
        mixed, perturbed = batch.interpolated("z", t), batch.perturbed(2 * batch.x, 0.1, "ar1")
        z, n = batch.noise("z").double(), batch.noise("ar1").double()
    assert mixed.dtype == perturbed.dtype == dtype
    x = batch.x.double()
    assert difference(mixed, interpolate(x, z, batch.layout.expand(t.double()))) <= TOLERANCE[dtype]
    assert difference(perturbed, 2 * x + 0.1 * n) <= TOLERANCE[dtype]
    reference = replace(batch, drawn={})
    with implementation("reference"):
        assert difference(mixed, reference.interpolated("z", t.to(dtype))) <= 2 * TOLERANCE[dtype]
        assert difference(perturbed, reference.perturbed(2 * batch.x, 0.1, "ar1")) <= 2 * TOLERANCE[dtype]


def test_a_gradient_goes_through_the_perturbation(mesh):
    batch = microbatch(mesh, IMAGES, model_config())
    x = batch.x.clone().requires_grad_(True)
    with implementation("kernels"):
        (gradient,) = torch.autograd.grad(batch.perturbed(x, 0.5, "n").square().sum(), x)
        torch.testing.assert_close(gradient, 2 * (x + 0.5 * batch.noise("n")).detach())


def test_one_rank_draws_its_own_tokens_of_one_video(mesh):
    model = model_config()
    shapes = ((4, 5, 12, 20),)
    whole = microbatch(mesh, shapes, model, (3,))
    part = microbatch(replace(mesh, cp=Axis(7, 4, None)), shapes, model, (3,))
    with implementation("kernels"):
        assert torch.equal(part.noise("z"), whole.noise("z")[part.layout.visual.index])


@pytest.mark.parametrize("kind", ["flow", "consistency", "apt"])
def test_what_the_methods_feed_their_networks(mesh, kind):
    config = run_config(kind)
    method = build_method(config, mesh)
    for phase in method.phases:
        for branch in phase.branches:
            feed, fed = branch.segments[0].feed, []
            for choice in ("kernels", "reference"):
                with implementation(choice):
                    fed.append(feed(microbatch(mesh, MIXED, config.model).for_phase(phase.name), {}))
            for got, want in zip(*fed, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
