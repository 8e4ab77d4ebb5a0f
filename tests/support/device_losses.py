"""Logged values of whole APT iterations on whatever device this process sees: `python -m
support.device_losses COUNT`, run in tests/, prints them as JSON.
"""

import json
import sys
from dataclasses import replace

import megatron_apt  # noqa: F401  (must stand before any import of megatron.core)
from megatron_apt.config import ParallelConfig, RunConfig
from megatron_apt.models.config import Fp8Config
from megatron_apt.parallel.mesh import Mesh


def run(recipe: str = "none") -> RunConfig:
    """bf16, of widths that FP8 products take, the blocks between the first and the last in FP8."""
    from support.parity import problem

    base = problem(dtype="bfloat16")
    model = replace(base.model, width=64, depth=4, fp8=Fp8Config(recipe))
    return replace(
        base,
        model=model,
        optimizer=replace(base.optimizer, lr=1e-4),
        parallel=ParallelConfig(row_multiple=32),
    )


def losses(mesh: Mesh, count: int, recipe: str = "none") -> list[dict[str, float]]:
    from support.parity import iterations

    return iterations(mesh, run(recipe), "images", count=count)["values"]


if __name__ == "__main__":
    from megatron_apt.parallel.startup import start

    print(json.dumps(losses(start(run().parallel), int(sys.argv[1]))))
