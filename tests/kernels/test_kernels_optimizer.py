"""rmsprop_ema against its reference in float64, on shards cut in many ways and on a
network; in the interpreter without a GPU.
"""

import pytest
import torch

from megatron_apt.kernels.launch import implementation, recording
from megatron_apt.kernels.rmsprop_ema import Stretch, Stretches, rmsprop_ema, rmsprop_ema_reference
from megatron_apt.methods.apt.config import AptConfig
from support.kernel_checks import DEVICE, TOLERANCE, difference, random
from support.problems import IMAGES, build, microbatch, run_config, run_phase

# (place in the shard, gap before it among the weights, length, lr_scale) of each stretch:
# one element, odd lengths and places, more than a chunk.
CASES = {
    "one": [(0, 0, 1, 1.0)],
    "odd": [(3, 1, 77, 1.0), (81, 0, 2049, 0.5), (2131, 2, 1, 5.0)],
    "chunk": [(0, 0, 2048, 0.1)],
    "aligned": [(0, 16, 4100, 1.0), (4112, 12, 2048, 3.0), (6160, 64, 5, 0.0)],
}
# Gradients, parameters
DTYPES = [(torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]
LR, ALPHA, EPS, DECAY = 1e-2, 0.9, 1e-8, 0.98


def buffers(case, grad_dtype, weights_dtype) -> tuple[dict[str, torch.Tensor], Stretches]:
    size = case[-1][0] + case[-1][2] + 9
    shard = {
        "master": random(size, seed=1),
        "square": torch.zeros(size, dtype=torch.float64),
        "average": random(size, seed=2),
    }
    shard = {
        name: value.to(DEVICE, torch.float64 if grad_dtype == torch.float64 else torch.float32)
        for name, value in shard.items()
    }
    grads, weights = (
        torch.zeros(size + 50, dtype=grad_dtype, device=DEVICE),
        torch.full((size + 200,), 7.0, dtype=weights_dtype, device=DEVICE),
    )
    entries, at = [], 0
    for place, gap, length, scale in case:
        at += gap
        entries.append(
            Stretch(
                slice(place, place + length), grads[place : place + length], weights[at : at + length], scale
            )
        )
        at += length
    return shard | {"grads": grads, "weights": weights}, Stretches(entries)


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("grad_dtype, weights_dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_three_steps(case, grad_dtype, weights_dtype, averaged):
    ours, stretches = buffers(CASES[case], grad_dtype, weights_dtype)
    wide, wide_stretches = buffers(CASES[case], torch.float64, torch.float64)
    start = {name: value.clone() for name, value in ours.items()}
    for step in range(3):
        for have, entries, call, choice in (
            (ours, stretches, rmsprop_ema, "kernels"),
            (wide, wide_stretches, rmsprop_ema_reference, "auto"),
        ):
            have["grads"].copy_(random(len(have["grads"]), seed=10 + step).to(grad_dtype))
            average = have["average"] if averaged else None
            with implementation(choice):
                call(have["master"], have["square"], average, entries, LR, ALPHA, EPS, DECAY)
    inside = torch.zeros(len(ours["master"]), dtype=torch.bool, device=DEVICE)
    for a, b in zip(stretches.entries, wide_stretches.entries, strict=True):
        inside[a.part] = True
        assert difference(a.weights, b.weights) <= TOLERANCE[weights_dtype]
        for name in ("master", "square") + (("average",) if averaged else ()):
            assert difference(ours[name][a.part], wide[name][b.part]) <= 2e-6, name
    for name in ("master", "square", "average"):
        untouched = ~inside if averaged or name != "average" else ...
        assert torch.equal(ours[name][untouched], start[name][untouched]), f"{name} outside of the stretches"
    assert (ours["weights"] == 7.0).sum() >= len(ours["weights"]) - inside.sum(), (
        "weights outside of the stretches"
    )


def test_chunks_cover_every_stretch_once():
    _, stretches = buffers(CASES["odd"], torch.float32, torch.bfloat16)
    (only,) = stretches.passes
    assert [row[3] for row in only.table.tolist()] == [77, 1024, 1024, 1, 1]
    assert only.scales.tolist() == [1.0, 0.5, 0.5, 0.5, 5.0]
    assert not only.aligned
    assert buffers(CASES["aligned"], torch.float32, torch.bfloat16)[1].passes[0].aligned


def test_buffers_of_two_dtypes_take_two_launches():
    (a, first), (b, second) = (
        buffers(CASES["odd"], torch.float32, torch.bfloat16),
        buffers(CASES["odd"], torch.float32, torch.float32),
    )
    moved = [
        Stretch(slice(s.part.start + 3000, s.part.stop + 3000), s.grad, s.weights, s.lr_scale)
        for s in second.entries
    ]
    stretches = Stretches([*first.entries, *moved])
    assert len(stretches.passes) == 2
    results = []
    for choice in ("kernels", "reference"):
        master, square = random(5200, seed=1).to(DEVICE, torch.float32), torch.zeros(5200, device=DEVICE)
        for have in (a, b):
            have["grads"].copy_(random(len(have["grads"]), seed=3))
        with implementation(choice):
            rmsprop_ema(master, square, None, stretches, LR, ALPHA, EPS)
        results.append((master, square, b["weights"].clone()))
    for got, want in zip(*results, strict=True):
        assert difference(got, want) <= 1e-6


def test_an_empty_shard_launches_nothing():
    empty = torch.empty(0, device=DEVICE)
    with recording() as launches:
        rmsprop_ema(empty, empty, empty, Stretches([]), LR, ALPHA, EPS, DECAY)
    assert launches == []


def test_three_updates_of_a_network(mesh):
    """Weights, state and average after the same gradients; the heads' rate is another than the backbone's."""
    config = run_config(apt=AptConfig(head_lr_scale=5.0))
    results = []
    for choice in ("kernels", "reference"):
        method, networks, executor = build(config, mesh)
        batch = microbatch(mesh, IMAGES, config.model)
        for phase in method.phases:
            run_phase(executor, phase, [batch])
        # Both after the gradients, which would be others behind an update that rounds
        # otherwise
        for network in networks.values():
            grad = [p.main_grad.clone() for p in network.shards.parameters]
            for i in range(3):
                for p, value in zip(network.shards.parameters, grad, strict=True):
                    p.main_grad.copy_((1 - 0.3 * i) * value)
                with implementation(choice):
                    network.update(3)
        found = {}
        for name, network in networks.items():
            found |= {f"{name}.{key}": p.detach() for key, p in network.module.named_parameters()}
            found |= {f"{name} {key}": value for key, value in network._buffers().items()}
            assert (
                not torch.cat([p.main_grad.flatten() for p in network.shards.parameters]).any()
                and network.updates == 3
            )
        results.append(found)
    assert set(results[0]) == set(results[1]) and "generator ema." in results[0]
    for key, want in results[1].items():
        assert difference(results[0][key], want) <= 1e-6, key
