"""Training on a GPU against training on a CPU and against other layers. Nothing here runs
without a GPU; kernels have tests of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.extensions import transformer_engine as te
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_apt.config import ParallelConfig
from megatron_apt.models import discriminator, joint, spec
from megatron_apt.models.config import Fp8Config
from megatron_apt.models.fp8 import require
from megatron_apt.parallel import startup
from support.device_losses import losses, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

COUNT = 20
# bf16 against fp32, both on a CPU, is up to 0.05 apart in a loss over these iterations;
# two kinds of bf16 may be that far on either side.
TOLERANCE = 0.1


@pytest.fixture(scope="module")
def wide():
    """A mesh whose rows are padded for FP8."""
    startup.stop()
    yield startup.start(run().parallel)
    startup.stop()


@pytest.fixture(scope="module")
def on_gpu(wide):
    return losses(wide, COUNT)


def assert_near(got: list[dict], want: list[dict], tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        for name in ("g/loss", "d/loss"):
            assert a[name] == pytest.approx(b[name], abs=tolerance), f"{name} of iteration {i + 1}"


def test_twenty_iterations_on_a_gpu_and_on_a_cpu(on_gpu):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "support.device_losses", str(COUNT)],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert_near(on_gpu, json.loads(done.stdout.splitlines()[-1]), TOLERANCE)


@pytest.mark.skipif(not te.HAVE_TE, reason="needs Transformer Engine")
def test_transformer_engine_and_torch_layers(on_gpu, wide, monkeypatch):
    for module in (joint, discriminator):
        monkeypatch.setattr(module, "choose_backend", lambda *_: spec.LocalBackend())
    assert_near(on_gpu, losses(wide, COUNT), TOLERANCE)


@pytest.mark.parametrize("recipe", ["current", "delayed", "blockwise", "mxfp8"])
def test_fp8(on_gpu, wide, recipe):
    try:
        require(Fp8Config(recipe), wide.device)
    except ValueError as error:
        pytest.skip(str(error))
    got = losses(wide, COUNT, recipe)
    assert got != on_gpu, "the FP8 run is the bf16 run"
    assert_near(got, on_gpu, 0.3)  # FP8 rounds eight times as coarsely as bf16; a wrong scale is far outside


@pytest.fixture
def deterministic(monkeypatch):
    """Every sum in a fixed order. Attention's backward pass needs more than a warning:
    its plain kernels, and Transformer Engine's own variable.
    """
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    torch.use_deterministic_algorithms(True, warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(False)


def test_the_same_seed_gives_the_same_losses(deterministic, wide):
    assert losses(wide, 3) == losses(wide, 3)


def test_a_mesh_on_cuda_speaks_nccl():
    mesh = startup.start(ParallelConfig(row_multiple=32))
    assert mesh.device.type == "cuda" and torch.distributed.get_backend(mesh.world.group) == "nccl"
