"""Every mesh computes what one rank computes: losses and every gradient of a G phase and a D phase, and of the other methods."""

import pytest
import torch
from problems import IMAGES, MIXED, VIDEOS, model_config, phase_gradients, run_config

from megatron_apt.config import AptConfig, ParallelConfig

MESHES = {
    "tp2": ParallelConfig(tp=2, sequence_parallel=False),
    "tp2-sp": ParallelConfig(tp=2, sequence_parallel=True),
    "cp2-ulysses": ParallelConfig(cp=2, context_parallel="ulysses"),
    "cp2-all_gather": ParallelConfig(cp=2, context_parallel="all_gather"),
}
DATA = {"images": (IMAGES, (3, 3, 3, 3)), "videos": (VIDEOS, (5, 5, 5, 5)), "mixed": (MIXED, (3, 1, 6, 4))}
APT = AptConfig(ar1_lambda=10.0, ar1_sigma=0.1, condition_dropout=0.3)


def gradients(mesh, config, shapes, text_lengths):
    return phase_gradients(config, mesh, shapes, text_lengths)


def compare(ours, reference, rtol):
    """Names the first difference. Tolerance of a gradient: rtol of its own largest entry."""
    for phase, want in reference.items():
        for name, value in want["metrics"].items():
            assert ours[phase]["metrics"][name] == pytest.approx(value, rel=rtol, abs=rtol), f"phase {phase}: metric {name}"
        assert ours[phase]["gradients"].keys() == want["gradients"].keys()
        for name, gradient in want["gradients"].items():
            error = (ours[phase]["gradients"][name] - gradient).abs().max()
            assert error <= rtol * gradient.abs().max() + 1e-12, (
                f"phase {phase}: gradient of {name} is off by {error:.2e}, of {gradient.abs().max():.2e}"
            )


@pytest.mark.dist
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("layout", MESHES)
def test_apt_on_two_ranks_equals_one(ranks, mesh, layout, data):
    # In float64: 1e-9 of the largest entry leaves no room for a wrong factor in any parameter.
    config = run_config(model=model_config(dtype="float64"), apt=APT)
    reference = gradients(mesh, config, *DATA[data])
    for result in ranks(2).run(gradients, MESHES[layout], config, *DATA[data]):
        compare(result, reference, 1e-9)


@pytest.mark.dist
@pytest.mark.parametrize("layout", MESHES)
def test_apt_in_fp32_stays_within_rounding(ranks, mesh, layout):
    # aR1 subtracts nearly equal logits, which lifts fp32 rounding above 1e-5 of a single small bias; the whole gradient of a phase stays below.
    config = run_config(apt=APT)
    reference = gradients(mesh, config, *DATA["images"])
    for result in ranks(2).run(gradients, MESHES[layout], config, *DATA["images"]):
        for phase, want in reference.items():
            for name, value in want["metrics"].items():
                assert result[phase]["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-6), f"phase {phase}: metric {name}"
            names = list(want["gradients"])
            got, expected = (torch.cat([g["gradients"][n].flatten() for n in names]).double() for g in (result[phase], want))
            assert (got - expected).norm() <= 1e-5 * expected.norm(), f"phase {phase}"


@pytest.mark.dist
@pytest.mark.parametrize("method", ["flow", "consistency"])
@pytest.mark.parametrize("layout", ["tp2-sp", "cp2-ulysses"])
def test_other_methods_on_two_ranks_equal_one(ranks, mesh, layout, method):
    config = run_config(method, model=model_config(dtype="float64", modulation="single", last_block_text=True, recompute="full"))
    reference = gradients(mesh, config, *DATA["mixed"])
    for result in ranks(2).run(gradients, MESHES[layout], config, *DATA["mixed"]):
        compare(result, reference, 1e-9)


@pytest.mark.dist
@pytest.mark.parametrize("method", ["all_gather", "ulysses"])
def test_tensor_and_context_parallel_together(ranks, mesh, method):
    config = run_config(model=model_config(dtype="float64", recompute="full"), apt=APT)
    reference = gradients(mesh, config, *DATA["mixed"])
    for result in ranks(4).run(gradients, ParallelConfig(tp=2, cp=2, context_parallel=method), config, *DATA["mixed"]):
        compare(result, reference, 1e-9)


@pytest.mark.parametrize("method", ["apt", "flow"])
def test_recomputation_changes_nothing(mesh, method):
    plain = gradients(mesh, run_config(method, model=model_config(dtype="float64")), *DATA["mixed"])
    compare(gradients(mesh, run_config(method, model=model_config(dtype="float64", recompute="full")), *DATA["mixed"]), plain, 1e-12)


def test_a_factor_on_one_gradient_is_noticed(mesh):
    reference = gradients(mesh, run_config(model=model_config(dtype="float64")), *DATA["images"])
    broken = {phase: {"metrics": r["metrics"], "gradients": dict(r["gradients"])} for phase, r in reference.items()}
    broken["d"]["gradients"]["heads.0.linear_q.weight"] = 2 * broken["d"]["gradients"]["heads.0.linear_q.weight"]
    with pytest.raises(AssertionError, match=r"heads\.0\.linear_q\.weight"):
        compare(broken, reference, 1e-9)


def test_every_gradient_of_the_problem_is_alive(mesh):
    result = gradients(mesh, run_config(model=model_config(dtype="float64")), *DATA["mixed"])
    for phase in result.values():
        dead = [name for name, gradient in phase["gradients"].items() if not torch.any(gradient)]
        # A common offset of every key of a head leaves its softmax, hence every gradient, unchanged: only key biases may be near zero.
        assert dead == []
