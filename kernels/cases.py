"""Every kernel with inputs, and what it moves and computes.

For the benchmark and the compile check.

Shapes are those of the 8B model at 1280x720, 2 s: 46,800 visual tokens of width 3,072 in
24 heads of 128.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_apt.kernels.gated_residual import gated_residual, gated_residual_reference
from megatron_apt.kernels.keyed_noise import (
    Tokens,
    keyed_normal,
    keyed_normal_reference,
    keyed_uniform,
    token_mix,
)
from megatron_apt.kernels.launch import Launch, recording
from megatron_apt.kernels.learnable_query_attention import (
    learnable_query_attention,
    learnable_query_attention_reference,
)
from megatron_apt.kernels.learnable_query_pooling import (
    learnable_query_pooling,
    learnable_query_pooling_reference,
)
from megatron_apt.kernels.modulated_norm import modulated_norm, modulated_norm_reference
from megatron_apt.kernels.projected_scores import projected_query_pooling, projected_query_pooling_reference
from megatron_apt.kernels.qk_norm_rope import joint_qkv, joint_qkv_reference
from megatron_apt.kernels.rmsprop_ema import Stretch, Stretches, rmsprop_ema, rmsprop_ema_reference
from megatron_apt.kernels.rows import Rows

TOKENS, WIDTH, HEADS, HEAD_SIZE = 46_800, 3072, 24, 128


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        inputs: makes its tensors on a device; floating-point ones take a gradient where
            `backward`.
        ours, eager: the same function of them, by kernels and in torch.
        moved: least bytes between chip and memory, forward and backward.
        flops: of matrix products, forward and backward.
        rival: name and call of a library's own, where there is one.
    """

    name: str
    inputs: Callable[[torch.device], list[Tensor]]
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    eager: Callable[..., Tensor | tuple[Tensor, ...]] | None
    moved: tuple[float, float]
    flops: tuple[float, float] = (0.0, 0.0)
    rival: tuple[str, Callable[..., Tensor]] | None = None
    backward: bool = True


def _normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def pointwise(dtype: torch.dtype, tokens: int = TOKENS, samples: int = 1) -> list[Case]:
    size = samples * tokens * WIDTH * dtype.itemsize
    cached: dict[torch.device, Rows] = {}

    def rows(device: torch.device) -> Rows:
        return cached.setdefault(device, Rows.uniform(samples, tokens, device))

    def norm_inputs(device):
        return [
            _normal(device, dtype, samples, tokens, WIDTH),
            *(_normal(device, dtype, samples, WIDTH) for _ in range(2)),
        ]

    def residual_inputs(device):
        x, h = (_normal(device, dtype, samples, tokens, WIDTH) for _ in range(2))
        return [x, _normal(device, dtype, samples, WIDTH), h]

    norms = [
        Case(
            f"modulated_norm {kind}",
            norm_inputs,
            lambda x, shift, scale, kind=kind: modulated_norm(x, shift, scale, rows(x.device), kind),
            lambda x, shift, scale, kind=kind: modulated_norm_reference(
                x, shift, scale, rows(x.device), kind
            ),
            (2 * size, 3 * size),
        )
        for kind in ("layer", "rms")
    ]
    residual = Case(
        "gated_residual",
        residual_inputs,
        lambda x, gate, h: gated_residual(x, gate, h, rows(x.device)),
        lambda x, gate, h: gated_residual_reference(x, gate, h, rows(x.device)),
        (3 * size, 3 * size),
    )
    return [*norms, residual]


def joint(dtype: torch.dtype, text: int = 256) -> Case:
    tables: dict[torch.device, Tensor] = {}

    def inputs(device):
        streams = [_normal(device, dtype, 1, length, HEADS, 3, HEAD_SIZE) for length in (text, TOKENS)]
        return [*streams, *(_normal(device, dtype, 2, HEAD_SIZE) for _ in range(2))]

    def table(device) -> Tensor:
        if device not in tables:
            phases = torch.rand(1, TOKENS, 1, 1, HEAD_SIZE // 2, device=device)
            tables[device] = torch.complex(phases.cos(), phases.sin())
        return tables[device]

    size, phases = (TOKENS + text) * WIDTH * dtype.itemsize, 4 * HEAD_SIZE * TOKENS
    return Case(
        "qk_norm_rope",
        inputs,
        lambda a, b, c, d: joint_qkv(a, b, c, d, table(a.device)),
        lambda a, b, c, d: joint_qkv_reference(a, b, c, d, table(a.device)),
        (6 * size + phases, 8 * size + phases),
    )


def update(dtype: torch.dtype, weights: int = 2**26) -> Case:
    """Weights of `dtype` with fp32 gradients, masters, state and average."""
    made: list[Stretches] = []  # of the gradient and the parameters of the latest inputs

    def inputs(device):
        master, square, average, grad = (torch.rand(weights, device=device) for _ in range(4))
        parameters = torch.empty(weights, device=device, dtype=dtype)
        made[:] = [Stretches([Stretch(slice(0, weights), grad, parameters, 1.0)])]
        return [master, square, average]

    numbers = (1e-5, 0.9, 1e-8, 0.995)

    def ours(*shard):
        rmsprop_ema(*shard, made[0], *numbers)

    def eager(*shard):
        rmsprop_ema_reference(*shard, made[0], *numbers)

    return Case("rmsprop_ema", inputs, ours, eager, ((28 + dtype.itemsize) * weights, 0.0), backward=False)


def noise(dtype: torch.dtype) -> list[Case]:
    """One video's latents, 16 x 13 x 90 x 160, and the same as 46,800 tokens of 64
    numbers, mixed into samples.
    """
    size, grid = (13, 90, 160), (13, 45, 80)
    count = 16 * size[0] * size[1] * size[2]

    def tokens(device) -> Tokens:
        positions = torch.cartesian_prod(*(torch.arange(n) for n in grid)).to(device)
        return Tokens(
            positions,
            torch.zeros(TOKENS, dtype=torch.int64, device=device),
            torch.tensor([size]).to(device),
            (1, 2, 2),
        )

    places: dict[torch.device, Tokens] = {}

    def mixed(x, ids, a, b):
        if x.device not in places:
            places[x.device] = tokens(x.device)
        return token_mix(7, ids, places[x.device], x, a, b)

    def drawn_and_mixed(x, ids, a, b):
        z = keyed_normal_reference(7, ids, count, dtype=x.dtype).view(16, 13, 45, 2, 80, 2)
        # To tokens, as patchify does
        return a.to(x.dtype) * x + b.to(x.dtype) * z.permute(1, 2, 4, 0, 3, 5).reshape(x.shape)

    def tokens_inputs(device):
        number = lambda value: torch.full((1,), value, device=device)  # noqa: E731
        return [
            _normal(device, dtype, TOKENS, 64),
            torch.zeros(1, dtype=torch.int64, device=device),
            number(0.3),
            number(0.7),
        ]

    ids = lambda device: [torch.zeros(1, dtype=torch.int64, device=device)]  # noqa: E731
    stream = Case(
        "keyed_normal",
        ids,
        lambda ids: keyed_normal(7, ids, count, dtype=dtype),
        lambda ids: keyed_normal_reference(7, ids, count, dtype=dtype),
        (count * dtype.itemsize, 0.0),
        backward=False,
    )
    uniform = Case(
        "keyed_uniform",
        ids,
        lambda ids: keyed_uniform(7, ids, count, dtype=dtype),
        None,
        (count * dtype.itemsize, 0.0),
        backward=False,
    )
    return [
        stream,
        uniform,
        Case(
            "token_mix",
            tokens_inputs,
            mixed,
            drawn_and_mixed,
            (2 * count * dtype.itemsize, 0.0),
            backward=False,
        ),
    ]


def queries(dtype: torch.dtype, tokens: int = TOKENS) -> list[Case]:
    """The discriminator's heads; the second and third do without a value projection, the
    third includes that of keys.
    """
    size, product, heads = tokens * WIDTH * dtype.itemsize, 2.0 * tokens * WIDTH * WIDTH, (HEADS, HEAD_SIZE)
    cached: dict[torch.device, Rows] = {}

    def shapes(*wide: tuple[int, ...]) -> Callable[[torch.device], list[Tensor]]:
        return lambda device: [_normal(device, dtype, *shape) for shape in (heads, *wide, (HEAD_SIZE,))]

    def on_rows(function: Callable) -> Callable:
        return lambda *tensors: function(
            *tensors, cached.setdefault(tensors[0].device, Rows.uniform(1, tokens, tensors[0].device))
        )

    def case(name, inputs, ours, eager, moved, flops=(0.0, 0.0)):
        return Case(name, inputs, on_rows(ours), on_rows(eager), moved, flops)

    def sdpa(q, kv, k_scale):
        k, v = (t.transpose(1, 2) for t in kv.unbind(3))
        return F.scaled_dot_product_attention(q[None, :, None], k, v)

    kv, x, pooled = (1, tokens, HEADS, 2, HEAD_SIZE), (1, tokens, WIDTH), 2.0 * tokens * HEADS * WIDTH
    projection = (WIDTH, WIDTH), (WIDTH,)
    return [
        replace(
            case(
                "learnable_query_attention",
                shapes(kv),
                learnable_query_attention,
                learnable_query_attention_reference,
                (2 * size, 4 * size),
            ),
            rival=("SDPA, keys normalised before", sdpa),
        ),
        case(
            "learnable_query_pooling",
            shapes((1, tokens, *heads), x),
            learnable_query_pooling,
            learnable_query_pooling_reference,
            (2 * size, 4 * size),
            (pooled, 2 * pooled),
        ),
        case(
            "projected_query_pooling",
            shapes(x, *projection),
            projected_query_pooling,
            projected_query_pooling_reference,
            (2 * size, 6 * size),
            (product + pooled, 3 * product + 2 * pooled),
        ),
    ]


def cases(dtype: torch.dtype) -> list[Case]:
    return [*pointwise(dtype), joint(dtype), *queries(dtype), update(dtype), *noise(dtype)]


def leaves_of(case: Case, device: torch.device) -> list[Tensor]:
    return [t.requires_grad_(case.backward and t.is_floating_point()) for t in case.inputs(device)]


def smooth_outputs(call: Callable, leaves: list[Tensor]) -> list[Tensor]:
    """The outputs that have a gradient."""
    out = call(*leaves)
    return [o for o in ([out] if isinstance(out, Tensor) else out or ()) if o.requires_grad]


def _run(case: Case, call: Callable, leaves: list[Tensor]) -> None:
    smooth = smooth_outputs(call, leaves)
    if case.backward:
        torch.autograd.backward(smooth, [torch.empty_like(o) for o in smooth])


def launches() -> list[Launch]:
    """Every launch that the cases would make, in bf16 and fp32."""
    found: list[Launch] = []
    for dtype in (torch.bfloat16, torch.float32):
        for case in cases(dtype):
            with recording() as recorded:
                _run(case, case.ours, leaves_of(case, torch.device("meta")))
            if not recorded:
                raise AssertionError(f"{case.name} launched nothing")
            found += recorded
    return found
