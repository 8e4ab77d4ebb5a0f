"""joint_qkv against its reference, in the interpreter without a GPU, alone and inside a model."""

from functools import partial

import pytest
import torch

from megatron_apt.kernels import qk_norm_rope
from megatron_apt.kernels.launch import implementation, launch
from megatron_apt.kernels.qk_norm_rope import joint_qkv, joint_qkv_reference
from support.kernel_checks import DEVICE, compare, difference, random
from support.problems import IMAGES, MIXED, build, microbatch, model_config, run_config

DTYPES = [torch.float32, torch.bfloat16]
# (samples, text tokens, visual tokens, heads, head size): one token, odd sizes, no text, many tiles.
CASES = [
    (1, 1, 1, 1, 8),
    (2, 5, 63, 3, 24),
    (1, 63, 1000, 1, 40),
    (2, 0, 9, 3, 64),
    (2, 1, 19, 1, 96),
    (1, 7, 63, 1, 128),
]


def phases(tokens: int, width: int, seed: int = 50) -> torch.Tensor:
    """(tokens, 1, 1, K / 2) unit complex64 numbers, without structure."""
    angles = random(tokens, 1, 1, width // 2, seed=seed, scale=3.0)
    return torch.polar(torch.ones_like(angles), angles).to(DEVICE, torch.complex64)


def tensors(text: tuple[int, int], visual: tuple[int, int], heads: int, width: int) -> list[torch.Tensor]:
    """Both projections, some heads larger than others, and both scales."""
    x = [
        random(*ab, heads, 3, width, seed=i) * 10.0 ** random(*ab, heads, 3, 1, seed=5 + i).clamp(-0.5, 0.5)
        for i, ab in enumerate((text, visual))
    ]
    return [*x, *(1 + 0.3 * random(2, width, seed=10 + i) for i in range(2))]


def check(inputs: list[torch.Tensor], dtype: torch.dtype, *arguments, after=lambda outputs: outputs) -> None:
    compare(
        lambda *x: after(joint_qkv(*x, *arguments)),
        lambda *x: after(joint_qkv_reference(*x, *arguments)),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, l_text, l_visual, heads, width", CASES)
def test_samples_of_one_length(n, l_text, l_visual, heads, width, dtype):
    inputs = tensors((n, l_text), (n, l_visual), heads, width)
    shared, own = phases(l_visual, width)[None], phases(n * l_visual, width).unflatten(0, (n, -1))
    for rotary in (shared, own) if n > 1 else (shared,):
        check(inputs, dtype, rotary)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "form, ranks, heads", [("apart", 1, 3), ("keys_values", 1, 2), ("by_rank", 2, 4), ("by_rank", 3, 3)]
)
def test_packed_samples(form, ranks, heads, dtype):
    """With padding rows, whose gradient is zero, without, and from streams whose own form is uniform."""
    for text, visual, tokens, period in [
        ((7, 1), (53, 1), (5, 50), 53),
        ((7, 1), (34, 1), (7, 34), 34),
        ((2, 3), (2, 17), (6, 34), 17),
    ]:
        rotary = phases(period, 24)[:, None] if visual[1] == 1 else phases(period, 24)[None]
        check(tensors(text, visual, heads, 24), dtype, rotary, tokens, form, ranks)


def test_without_rotation():
    check(tensors((2, 3), (2, 5), 2, 16), torch.float32, None)


@pytest.mark.parametrize("tokens", [None, (5, 40)])
def test_without_norms(tokens):
    """Models that normalise elsewhere, or not at all."""
    text, visual, weight, _ = tensors(
        (2, 3) if tokens is None else (6, 1), (2, 20) if tokens is None else (43, 1), 2, 16
    )
    rotary = phases(20, 16)[None] if tokens is None else phases(43, 16)[:, None]
    for own in (None, weight):
        inputs = [text, visual] if own is None else [text, visual, own]
        check_with = [
            partial(lambda f, t, v, w=None: f(t, v, None, w, rotary, tokens), f)
            for f in (joint_qkv, joint_qkv_reference)
        ]
        compare(*check_with, inputs, torch.float32)


@pytest.mark.parametrize(
    "after",
    [
        # Heads before tokens, as attention has them, and others
        lambda q, k, v: (q.transpose(1, 2), k.permute(2, 0, 1, 3), v.transpose(0, 1)),
        # Expanded over heads, over the head's numbers; those not innermost
        lambda q, k, v: (q.sum(2), k.sum(-1), v.transpose(-1, -2)),
    ],
)
def test_operands_and_gradients_of_any_strides(after):
    inputs = tensors((4, 2), (9, 2), 3, 24)

    def call(f, text, visual, *weights):
        return after(*f(text.transpose(0, 1), visual.transpose(0, 1), *weights, phases(9, 24)[None]))

    compare(partial(call, joint_qkv), partial(call, joint_qkv_reference), inputs, torch.float32)


def test_a_video_of_46800_tokens(monkeypatch):
    monkeypatch.setattr(qk_norm_rope, "_NUMBERS", 8192)  # the interpreter's time goes by programs
    check(tensors((1, 256), (1, 46800), 1, 8), torch.float32, phases(46800, 8)[None])


@pytest.mark.parametrize("programs", [1, 7])
def test_any_split_of_the_heads(programs, monkeypatch):
    """A program may take all heads, some of them, or one; 5 heads do not split evenly."""
    monkeypatch.setattr(qk_norm_rope, "_PROGRAMS", programs)
    check(tensors((2, 3), (2, 40), 5, 32), torch.float32, phases(40, 32)[None])


def test_the_order_of_sums_is_fixed():
    inputs = [x.to(DEVICE, torch.float32).requires_grad_() for x in tensors((1, 3), (1, 70), 2, 40)]
    with implementation("kernels"):
        runs = [
            torch.autograd.grad(
                sum(y.square().sum() for y in joint_qkv(*inputs, phases(70, 40)[None])), inputs
            )
            for _ in range(2)
        ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    "shapes, recompute",
    [(IMAGES, "none"), (IMAGES, "full"), (MIXED, "full")],
    ids=["uniform", "recomputed", "packed"],
)
def test_a_model_with_kernels_equals_one_with_references(mesh, shapes, recompute, monkeypatch):
    """Output and every parameter's gradient of a small MMDiT in fp32."""
    launched = []
    monkeypatch.setattr(
        qk_norm_rope,
        "launch",
        lambda kernel, *args, **kwargs: (launched.append(kernel), launch(kernel, *args, **kwargs)),
    )
    config = run_config("flow", model=model_config(dtype="float32", recompute=recompute))
    _, networks, _ = build(config, mesh)
    network = networks["generator"]
    batch = microbatch(mesh, shapes, config.model).for_phase("g")
    results = []
    for choice in ("reference", "kernels"):
        with implementation(choice):
            for parameter in network.module.parameters():
                parameter.grad = None
            network.shards.zero_grad()
            v = network.module(batch.x, batch.times(0.5), batch.condition, batch.layout)
            v.square().mean().backward()
        results.append(
            {"v": v.detach()} | {name: p.main_grad.clone() for name, p in network.module.named_parameters()}
        )
    forwards = 2 * config.model.depth * (2 if recompute == "full" else 1)  # for two streams
    assert (launched.count(qk_norm_rope._forward), launched.count(qk_norm_rope._backward)) == (
        forwards,
        2 * config.model.depth,
    )
    for name, want in results[0].items():
        assert difference(results[1][name], want) < 1e-5, name
