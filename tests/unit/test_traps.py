"""The seven traps of adversarial post-training seen in public code, one test each
(method: APT, section 3.3 to 3.5).
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from megatron_apt.kernels.learnable_query_attention import learnable_query_attention, merge
from megatron_apt.kernels.rows import Rows
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.schedule.execute import frozen
from support.problems import (
    IMAGES,
    MIXED,
    build,
    gradient_of,
    microbatch,
    model_config,
    phase_gradients,
    run_config,
    run_phase,
)

F64 = model_config(dtype="float64")


def test_1_a_sample_and_its_perturbation_share_label_condition_dropout_and_packing(mesh):
    apt = AptConfig(ar1_sigma=0.1, condition_dropout=0.5, timestep_shift=12.0)
    method, _, _ = build(run_config(model=F64, apt=apt), mesh)
    batch = microbatch(mesh, MIXED, F64, (3, 1, 6, 4)).for_phase("d")
    segment = method.phases[1].branches[0].segments[0]
    (x, t), condition = segment.feed(batch, {}), segment.condition(batch)
    n = len(MIXED)
    assert torch.equal(t[:n], t[n:])
    assert len(set(t[:n].tolist())) == n, "one label per sample, not one per pack"
    assert condition.lengths[:n] == condition.lengths[n:]
    first, second = condition.tokens.chunk(2)
    assert torch.equal(first, second)
    assert (
        not torch.equal(first, batch.condition.tokens) or condition.lengths[:n] != batch.condition.lengths
    ), "dropout took no caption"
    layout = batch.layout_for(condition)
    assert layout.grids[:n] == layout.grids[n:]
    x, perturbed = x.chunk(2)
    assert torch.equal(x, batch.x)
    assert float((perturbed - x).std()) == pytest.approx(0.1, rel=0.1)


def test_2_gradients_flow_through_both_terms_of_ar1(mesh):
    # With the perturbed term cut off, the gradient of (D(x) - D(x'))^2 would be 2 (D(x) -
    # D(x')) grad D(x) alone.
    config = run_config(model=F64, apt=AptConfig(ar1_lambda=1e6, ar1_sigma=0.1))
    method, networks, executor = build(config, mesh)
    batch = microbatch(mesh, IMAGES, F64).for_phase("d")
    run_phase(executor, method.phases[1], [batch])
    network, d = networks["discriminator"], networks["discriminator"].module
    ours = gradient_of(network)

    def gradient(cut: bool):
        network.shards.zero_grad()
        t = batch.uniform("t_real")
        clean, noisy = (
            d(x, t, batch.condition, batch.layout) for x in (batch.x, batch.x + 0.1 * batch.noise("ar1"))
        )
        (1e6 * (clean - (noisy.detach() if cut else noisy)).square().mean()).backward()
        return gradient_of(network)

    both, one = gradient(cut=False), gradient(cut=True)
    # What remains is the adversarial loss, a millionth of the weight
    assert (ours - both).norm() < 1e-3 * both.norm()
    assert (ours - one).norm() > 0.5 * both.norm()


def test_3_the_g_step_goes_through_d_but_gives_its_weights_nothing(mesh):
    method, networks, executor = build(run_config(model=F64), mesh)
    batch = microbatch(mesh, IMAGES, F64)
    run_phase(executor, method.phases[0], [batch])
    assert not gradient_of(networks["discriminator"]).any()
    assert gradient_of(networks["generator"]).any()
    # No weight-gradient product is even part of the graph.
    d = networks["discriminator"].module
    with frozen(d):
        x = batch.x.clone().requires_grad_(True)
        logits = d(x, batch.times(0.5), batch.condition, batch.layout)
    assert leaves(logits) == {id(x)}
    assert all(p.requires_grad for p in d.parameters())


def leaves(tensor: torch.Tensor) -> set[int]:
    """ids of the tensors whose gradients a backward from here would accumulate."""
    found, stack, seen = set(), [tensor.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack += [child for child, _ in node.next_functions]
    return found


def test_4_head_layers_come_from_configuration_and_depth():
    def head_blocks(fractions, depth):
        return AptConfig(head_layers=fractions).head_blocks(depth)

    paper = (16 / 36, 26 / 36, 1.0)
    assert head_blocks(paper, 36) == (16, 26, 36)
    assert head_blocks((14 / 18, 16 / 18, 1.0), 18) == (14, 16, 18)  # Figure 6: half depth
    assert head_blocks((18 / 26, 22 / 26, 1.0), 26) == (18, 22, 26)
    assert head_blocks((1.0,), 36) == (36,)
    assert head_blocks(paper, 6) == (3, 4, 6)
    with pytest.raises(ValueError, match="some twice"):
        head_blocks(paper, 2)


def test_5_the_whole_discriminator_trains_unless_told_otherwise(mesh):
    gradients = phase_gradients(run_config(model=F64), mesh, IMAGES)["d"]["gradients"]
    backbone = {name: g for name, g in gradients.items() if name.startswith("backbone.")}
    assert len(backbone) > 20
    assert all(g.any() for g in backbone.values())
    frozen_backbone = phase_gradients(
        run_config(model=F64, apt=AptConfig(train_backbone=False)), mesh, IMAGES
    )["d"]["gradients"]
    assert frozen_backbone
    assert not any(name.startswith("backbone.") for name in frozen_backbone)
    # The generator still learns through a frozen backbone.
    assert any(
        g.any()
        for g in phase_gradients(run_config(model=F64, apt=AptConfig(train_backbone=False)), mesh, IMAGES)[
            "g"
        ]["gradients"].values()
    )


@pytest.mark.parametrize("cuts", [(5,), (1, 2), (3, 10, 16)])
def test_6_the_head_softmax_is_one_softmax_over_all_tokens_of_a_sample(cuts):
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(2, 17, 3, 2, 8, generator=generator, dtype=torch.float64)
    q, k_scale = (
        30 * torch.randn(3, 8, generator=generator, dtype=torch.float64),
        torch.rand(8, generator=generator, dtype=torch.float64),
    )
    k, v = kv.unbind(-2)  # q is large: sharp attention, where separate softmaxes would be far off
    weights = torch.softmax(
        torch.einsum("hk,nshk->nhs", q, F.rms_norm(k, (8,), k_scale, eps=1e-6)) / 8**0.5, dim=-1
    )
    want = torch.einsum("nhs,nshk->nhk", weights, v)
    bounds = [0, *cuts, 17]
    _, total, acc = merge(
        [
            learnable_query_attention(q, kv[:, a:b], k_scale, Rows.uniform(2, b - a))
            for a, b in itertools.pairwise(bounds)
        ]
    )
    assert torch.allclose(acc / total.unsqueeze(-1), want, rtol=1e-12, atol=1e-14)


def test_7_under_packing_a_head_attends_within_its_own_sample(mesh):
    _, networks, _ = build(run_config(model=F64), mesh)
    d = networks["discriminator"].module
    batch = microbatch(mesh, MIXED, F64, (3, 1, 6, 4))
    assert not batch.layout.visual.uniform
    t = batch.uniform("t")
    before = d(batch.x, t, batch.condition, batch.layout)
    other = batch.x.clone()
    other[batch.layout.visual.sample == 1] += 10.0
    after = d(other, t, batch.condition, batch.layout)
    changed = (before - after).abs() > 1e-12
    assert changed.tolist() == [False, True, False, False]
