"""Every kernel compiles for Hopper at the 8B model's shapes, in a process that does not
interpret, and what the compiler reports is looked at.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_apt.kernels.compile import Resources, compiled
from megatron_apt.kernels.gated_residual import gated_residual
from megatron_apt.kernels.launch import choose, implementation, interpreted, recording, triton
from megatron_apt.kernels.rows import Rows

pytestmark = pytest.mark.skipif(triton is None, reason="needs Triton")


def bench(*arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "megatron_apt.kernels.bench", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_every_kernel_compiles_for_hopper_without_spilling(tmp_path):
    done = bench("--compile-only", "--json", str(tmp_path / "resources.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "resources.json").read_text())
    names = {row["kernel"].partition(".")[0] for row in rows}
    assert names >= {
        "modulated_norm",
        "gated_residual",
        "qk_norm_rope",
        "learnable_query_attention",
        "rmsprop_ema",
        "keyed_noise",
        "rows",
    }
    for row in rows:
        assert (
            0 < row["registers"] <= 255
            and row["spilled"] == 0
            and row["shared"] <= 227 * 1024
            and row["blocks"] >= 1
        ), row
    # On the chip's matrix units, not as a sum of products.
    assert {
        row["matrix"]
        for row in rows
        if row["kernel"] == "learnable_query_pooling.pool" and "bf16" in row["types"]
    } <= {"wgmma", "mma"}


def test_without_a_gpu_nothing_is_measured():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = bench()
    assert done.returncode == 0 and "No CUDA GPU here: nothing is measured" in done.stdout


def test_problems_are_found():
    spilling = Resources("a", "bf16", registers=255, spilled=16, shared=300_000, warps=8, matrix="")
    assert len(spilling.problems()) == 2
    # 65,536 / (64 * 256)
    assert Resources("a", "bf16", registers=64, spilled=0, shared=1024, warps=8, matrix="").blocks == 4


def test_recording_launches_nothing():
    x = torch.ones(1, 5, 8, device="meta", requires_grad=True)
    with recording() as launches:
        gated_residual(x, torch.ones(1, 8, device="meta"), x, Rows.uniform(1, 5, "meta")).sum().backward()
    assert [launch.kernel.fn.__name__ for launch in launches] == ["_forward", "_backward", "_sum_blocks"]
    if interpreted():
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
            compiled(launches[0])


def test_the_choice_lasts_for_the_process_and_a_context_ends():
    x, gate, rows = torch.ones(1, 2, 8), torch.ones(1, 8), Rows.uniform(1, 2)
    with implementation("reference"), recording() as launches:
        with implementation("reference"):
            gated_residual(x, gate, x, rows)
        assert not launches
        gated_residual(x, gate, x, rows)
        assert launches
    choose("reference")
    choose("auto")
    with recording() as launches:
        pass
    assert not launches
