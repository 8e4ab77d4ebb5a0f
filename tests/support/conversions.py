"""From a pipeline's folder to a trained one-step generator, and how its samples are compared."""

import json
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from PIL import Image

from megatron_apt.config import OptimizerConfig, RunConfig
from megatron_apt.convert.command import Command, perform
from megatron_apt.convert.exporter import Checkpoint
from megatron_apt.encode.decode import Clip, decode_clip
from megatron_apt.models.condition import Condition
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.sample.command import load_generator
from megatron_apt.sample.sampler import Sampler
from megatron_apt.training.train import train

PROMPT = "the quick fox runs"


def convert(mesh: Mesh, *argv) -> int:
    """As on the command line, but on the mesh of the tests."""
    return perform(tyro.cli(Command, args=list(map(str, argv))), mesh)


def imported(mesh: Mesh, pipeline: Path, target: Path) -> RunConfig:
    """Imports a pipeline's transformer; returns what its stages have in common."""
    assert convert(mesh, "import", pipeline, target) == 0
    assert convert(mesh, "verify", target, pipeline) == 0
    model = Checkpoint.open(str(target)).model
    return RunConfig(
        model=model,
        iterations=2,
        global_batch=4,
        micro_batch=2,
        tensorboard=False,
        optimizer=OptimizerConfig(kind="adamw", lr=1e-3, ema=0.0),
    )


def trained(mesh: Mesh, config: RunConfig, output: Path, **changes) -> str:
    train(replace(config, output=str(output), **changes), mesh)
    return str(output)


def one_step(mesh: Mesh, run: str, weights: str, z: torch.Tensor, condition: Condition) -> torch.Tensor:
    """Our sample of one latent (C, F, H, W), as `megatron-apt sample` makes it."""
    return Sampler(load_generator(run, mesh, weights).model, mesh, condition, condition).one_step(z[None])[0]


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def frames_of(clips: Path, height: int = 32, width: int = 48) -> list[Image.Image]:
    """The clips' first frames, as a user of the pipeline would hand them in."""
    paths = [clips.parent / json.loads(line)["path"] for line in clips.read_text().splitlines()]
    values = [decode_clip(Clip(path, height, width, allow_upscale=True)) * 127.5 + 127.5 for path in paths]
    return [Image.fromarray(v[:, 0].round().byte().permute(1, 2, 0).numpy()) for v in values]
