"""The MMDiT and its discriminator: packing, size, embeddings, layout."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_apt.families.mmdit.config import MMDiTConfig, seaweed_8b, tiny
from megatron_apt.families.mmdit.model import MMDiT
from megatron_apt.kernels.qk_norm_rope import rotate
from megatron_apt.kernels.rms_norm import rms_norm, rms_norm_reference
from megatron_apt.models import parameters
from megatron_apt.models.condition import Condition
from megatron_apt.models.embeddings import patchify, unpatchify
from megatron_apt.models.layout import build_layout, chunk
from megatron_apt.parallel.mesh import Axis
from support.problems import IMAGES, MIXED, build, microbatch, model_config, run_config

F64 = model_config(dtype="float64")


@pytest.mark.parametrize("role", ["generator", "discriminator"])
@pytest.mark.parametrize(
    "change",
    [{}, {"modulation": "single", "last_block_text": True}, {"patch": (1, 1, 2), "pooled_text": False}],
)
def test_a_pack_equals_its_samples_one_by_one(mesh, role, change):
    model = replace(F64, **change)
    _, networks, _ = build(run_config(model=model), mesh)
    network = networks[role].module
    lengths = (3, 1, 6, 4)
    batch = microbatch(mesh, MIXED, model, lengths)
    t = batch.uniform("t")
    together = network(batch.x, t, batch.condition, batch.layout)
    tokens, texts = batch.x.split(batch.layout.visual.counts), batch.condition.tokens.split(lengths)
    for i, out in enumerate(
        together.split(batch.layout.visual.counts) if role == "generator" else together.split(1)
    ):
        layout = build_layout((batch.grids[i],), (lengths[i],), mesh)
        alone = network(tokens[i], t[i : i + 1], Condition.pack([texts[i]]), layout)
        assert torch.allclose(out, alone, rtol=1e-9, atol=1e-12), f"sample {i}"


def test_the_batched_fast_path_equals_the_packed_one(mesh):
    _, networks, _ = build(run_config(model=F64), mesh)
    batch = microbatch(mesh, IMAGES, F64)
    assert batch.layout.batched
    t = batch.uniform("t")
    fast = networks["generator"].module(batch.x, t, batch.condition, batch.layout)
    # A fifth sample of another size makes the same four take the packed path.
    extra = microbatch(mesh, ((4, 1, 4, 4),), F64, (2,), seed=9, global_batch=1)
    condition = batch.condition.join(extra.condition)
    layout = build_layout(batch.grids + extra.grids, condition.lengths, mesh)
    assert not layout.batched
    packed = networks["generator"].module(
        torch.cat((batch.x, extra.x)), torch.cat((t, t[:1])), condition, layout
    )
    assert torch.allclose(packed[: len(fast)], fast, rtol=1e-9, atol=1e-12)


def test_seaweed_8b_has_the_published_size(mesh):
    model = seaweed_8b()
    with torch.device("meta"):
        network = MMDiT(replace(model, recompute="none"), mesh)
    layers = sum(
        p.numel()
        for name, p in network.named_parameters()
        if ".linear_" in name and name.endswith("weight") and name.startswith("blocks.")
    )
    assert layers == 36 * (2 * 4 + 2 * 8) * 3072**2
    assert layers == pytest.approx(8.15e9, rel=1e-3)
    total = parameters.count(network, mesh)
    embeddings = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("blocks."))
    small = total - layers - embeddings
    assert embeddings < 0.012 * layers  # patches, text, time, the one shared modulation, output
    assert small < 0.001 * layers  # biases, norms and AdaLN-single offsets
    assert (network.model.depth, network.model.width, network.model.heads, network.model.head_size) == (
        36,
        3072,
        24,
        128,
    )


def test_presets_are_what_they_say():
    assert (tiny().depth, tiny().width, tiny().heads) == (6, 64, 4)
    assert seaweed_8b().dtype == "bfloat16"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 0}, "heads=0"),
        ({"patch": (0, 2, 2)}, "patch"),
        ({"width": 65}, "width=65"),
        ({"width": 60, "heads": 12}, "even head size"),
        ({"width": 66, "heads": 6, "depth": 1}, "even head size"),
    ],
)
def test_model_sizes_that_cannot_work_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MMDiTConfig(**fields)


def test_patchify_is_invertible_and_orders_tokens_by_frame_row_column():
    x = torch.arange(2 * 3 * 2 * 4 * 6, dtype=torch.float32).view(2, 3, 2, 4, 6)
    tokens = patchify(x, (1, 2, 2))
    assert torch.equal(unpatchify(tokens, (2, 2, 3), (1, 2, 2)), x)
    # Sample 0, frame 0, row 1, column 1 of a 2 x 2 x 3 grid
    assert torch.equal(tokens[4].view(3, 1, 2, 2), x[0, :, 0:1, 2:4, 2:4])
    with pytest.raises(ValueError, match="does not split into patches"):
        patchify(x, (1, 3, 2))


def test_rotary_scores_depend_on_relative_position_only(mesh):
    from megatron_apt.models.embeddings import rotary_table

    layout = build_layout(((3, 4, 5),), (2,), mesh)
    table = rotary_table(layout, (2, 2, 2), 100.0, torch.float64)
    q, k = torch.randn(2, 12, dtype=torch.float64)
    index = {tuple(p): i for i, p in enumerate(layout.positions.tolist())}
    at = lambda v, place: rotate(v.view(1, 1, 1, 1, 12), table[:, index[place]][:, None])  # noqa: E731
    score = lambda a, b: float((at(q, a) * at(k, b)).sum())  # noqa: E731
    assert score((0, 1, 2), (1, 2, 4)) == pytest.approx(score((1, 0, 1), (2, 1, 3)), rel=1e-12)
    assert score((0, 0, 0), (0, 0, 0)) == pytest.approx(float(q @ k), rel=1e-12)
    assert score((0, 0, 0), (1, 0, 0)) != pytest.approx(float(q @ k), rel=1e-3)
    assert MMDiTConfig(width=256, heads=2).rotary_pairs == (22, 21, 21)


@given(st.integers(0, 200), st.integers(1, 9))
@settings(deadline=None)
def test_chunks_cover_everything_once_and_evenly(length, parts):
    ranges = [chunk(length, parts, part) for part in range(parts)]
    assert [i for a, b in ranges for i in range(a, b)] == list(range(length))
    sizes = [b - a for a, b in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_too_few_tokens_for_context_parallelism_are_named(mesh):
    wide = replace(mesh, cp=Axis(4, 0, None))
    with pytest.raises(ValueError, match=r"2 visual tokens does not split over parallel\.cp=4"):
        build_layout(((1, 1, 2),), (3,), wide)


def test_attention_equals_an_independent_implementation(mesh):
    """One block's joint attention against torch's MultiheadAttention-style formula on the same weights."""
    model = model_config(dtype="float64", depth=1, last_block_text=True)
    _, networks, _ = build(run_config("flow", model=model), mesh)
    block = networks["generator"].module.blocks["0"]
    generator = torch.Generator().manual_seed(3)
    x, text, c = (torch.randn(2, n, 48, generator=generator, dtype=torch.float64) for n in (6, 3, 1))
    layout = build_layout(((1, 2, 3),) * 2, (3, 3), mesh)
    ones = torch.ones(1, 6, 1, 1, model.head_size // 2, dtype=torch.complex128)  # no rotation
    got_x, got_text = block(x, text, c[:, 0], None, layout, ones)

    def stream(part, h):
        mods = (part.modulation.linear.weight @ F.silu(c[:, 0]).T).T + part.modulation.linear.bias
        s1, k1, g1, s2, k2, g2 = mods.unsqueeze(1).chunk(6, -1)
        qkv = (
            F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + k1) + s1
        ) @ part.linear_qkv.weight.T + part.linear_qkv.bias
        q, k, v = qkv.view(2, -1, 4, 3, 12).unbind(3)
        norm = lambda y, w: y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w  # noqa: E731
        return norm(q, part.qk_norm.weight[0]), norm(k, part.qk_norm.weight[1]), v, (g1, s2, k2, g2)

    qx, kx, vx, mx = stream(block.visual, x)
    qt, kt, vt, mt = stream(block.text, text)
    q, k, v = torch.cat((qt, qx), 1), torch.cat((kt, kx), 1), torch.cat((vt, vx), 1)
    weights = torch.softmax(torch.einsum("bqhk,bshk->bhqs", q, k) / 12**0.5, -1)
    out = torch.einsum("bhqs,bshk->bqhk", weights, v).flatten(2)

    def finish(part, h, attended, mods):
        g1, s2, k2, g2 = mods
        h = h + g1 * (attended @ part.linear_proj.weight.T + part.linear_proj.bias)
        y = (
            F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + k2) + s2
        ) @ part.linear_fc1.weight.T + part.linear_fc1.bias
        return h + g2 * (F.gelu(y, approximate="tanh") @ part.linear_fc2.weight.T + part.linear_fc2.bias)

    assert torch.allclose(got_text, finish(block.text, text, out[:, :3], mt), rtol=1e-9, atol=1e-12)
    assert torch.allclose(got_x, finish(block.visual, x, out[:, 3:], mx), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(7, 3, 2, 12), (1, 5)])
def test_rms_norm_gradients(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(
        shape[-2:] if len(shape) > 2 else shape[-1:],
        generator=generator,
        dtype=torch.float64,
        requires_grad=True,
    )
    assert torch.autograd.gradcheck(rms_norm, (x, w))
    assert torch.allclose(rms_norm(x, w), rms_norm_reference(x, w), rtol=1e-12)
    low = rms_norm(x.detach().bfloat16(), w.detach().bfloat16())
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.double(), rms_norm(x, w), rtol=0.02, atol=0.02)


def test_bf16_discriminator_gives_fp32_logits_close_to_fp64(mesh):
    logits = {}
    for dtype in ("bfloat16", "float64"):
        model = model_config(dtype=dtype)
        _, networks, _ = build(run_config(model=model), mesh)
        batch = microbatch(mesh, MIXED, model, (3, 1, 6, 4))
        logits[dtype] = networks["discriminator"].module(
            batch.x, batch.times(0.5), batch.condition, batch.layout
        )
    assert logits["bfloat16"].dtype == torch.float32
    assert torch.allclose(logits["bfloat16"].double(), logits["float64"], rtol=0.05, atol=0.05)
