"""Whole phases of APT with every kernel in place of its reference: losses and all
gradients of both networks, in fp32.
"""

import pytest
import torch

from megatron_apt.kernels.launch import implementation
from megatron_apt.methods.apt.config import AptConfig
from support.kernel_checks import difference
from support.problems import IMAGES, MIXED, model_config, phase_gradients, run_config

# aR1 subtracts logits that are nearly equal, which magnifies rounding (and the 1e-6 by
# which normal numbers differ); a wrong term is far outside.
TOLERANCE = 2e-4


@pytest.mark.parametrize(
    ("shapes", "texts"), [(IMAGES, (3,) * 4), (MIXED, (3, 1, 6, 4))], ids=["uniform", "packed"]
)
def test_apt_with_kernels_equals_apt_with_references(mesh, shapes, texts):
    config = run_config(
        "apt",
        model=model_config(depth=2),
        apt=AptConfig(ar1_lambda=1.0, ar1_sigma=0.5, head_layers=(0.5, 1.0)),
    )
    found = {}
    for choice in ("reference", "kernels"):
        with implementation(choice):
            found[choice] = phase_gradients(config, mesh, shapes, texts)
    for phase, want in found["reference"].items():
        got = found["kernels"][phase]
        for name, value in want["metrics"].items():
            assert got["metrics"][name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), (
                f"{phase}: {name}"
            )
        for name, gradient in want["gradients"].items():
            assert difference(got["gradients"][name], gradient) <= TOLERANCE, f"{phase}: gradient of {name}"
    assert any(
        not torch.equal(a, found["kernels"]["d"]["gradients"][name])
        for name, a in found["reference"]["d"]["gradients"].items()
    )
