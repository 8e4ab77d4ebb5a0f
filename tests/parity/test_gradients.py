"""Gradients of whole phases on one rank: recomputation changes none, none is dead, and a
comparison notices a factor.
"""

import pytest
import torch

from support.problems import IMAGES, MIXED, model_config, phase_gradients, run_config

DATA = {"images": (IMAGES, (3, 3, 3, 3)), "mixed": (MIXED, (3, 1, 6, 4))}


def gradients(mesh, config, shapes, text_lengths):
    return phase_gradients(config, mesh, shapes, text_lengths)


def compare(ours, reference, rtol):
    """Names the first difference. Tolerance of a gradient: rtol of its own largest entry."""
    for phase, want in reference.items():
        for name, value in want["metrics"].items():
            assert ours[phase]["metrics"][name] == pytest.approx(value, rel=rtol, abs=rtol), (
                f"phase {phase}: metric {name}"
            )
        assert ours[phase]["gradients"].keys() == want["gradients"].keys()
        for name, gradient in want["gradients"].items():
            error = (ours[phase]["gradients"][name] - gradient).abs().max()
            assert error <= rtol * gradient.abs().max() + 1e-12, (
                f"phase {phase}: gradient of {name} is off by {error:.2e}, of {gradient.abs().max():.2e}"
            )


@pytest.mark.parametrize("method", ["apt", "flow"])
def test_recomputation_changes_nothing(mesh, method):
    plain = gradients(mesh, run_config(method, model=model_config(dtype="float64")), *DATA["mixed"])
    compare(
        gradients(
            mesh, run_config(method, model=model_config(dtype="float64", recompute="full")), *DATA["mixed"]
        ),
        plain,
        1e-12,
    )


def test_a_factor_on_one_gradient_is_noticed(mesh):
    reference = gradients(mesh, run_config(model=model_config(dtype="float64")), *DATA["images"])
    broken = {
        phase: {"metrics": r["metrics"], "gradients": dict(r["gradients"])} for phase, r in reference.items()
    }
    broken["d"]["gradients"]["heads.0.linear_q.weight"] = (
        2 * broken["d"]["gradients"]["heads.0.linear_q.weight"]
    )
    with pytest.raises(AssertionError, match=r"heads\.0\.linear_q\.weight"):
        compare(broken, reference, 1e-9)


def test_every_gradient_of_the_problem_is_alive(mesh):
    result = gradients(mesh, run_config(model=model_config(dtype="float64")), *DATA["mixed"])
    for phase in result.values():
        dead = [name for name, gradient in phase["gradients"].items() if not torch.any(gradient)]
        # A common offset of every key of a head leaves its softmax, hence every gradient,
        # unchanged: only key biases may be near zero.
        assert dead == []
