"""The demo's runs, for `megatron-apt train examples/tiny.py:NAME` on a CPU.

    megatron-apt train examples/tiny.py:image
    torchrun --nproc-per-node 2 -m megatron_apt train examples/tiny.py:image --parallel.tp 2

The digits are written and encoded on first use. Later stages start from the demo's
checkpoints where there are some (`make demo`), and otherwise from weights drawn from the
seed, which trains but shows nothing of the method's quality.
"""

import warnings
from dataclasses import replace
from pathlib import Path

from megatron_apt.config import InitConfig, RunConfig
from megatron_apt.demo import recipes
from megatron_apt.demo.command import ensure_digits

PLACE = recipes.Place("runs/demo")


def _run(recipe, name: str) -> RunConfig:
    config = recipe(PLACE)
    for folder in config.data.shards:
        ensure_digits(PLACE, Path(folder).name)
    sources = [source for source in (config.init.generator, config.init.diffusion) if source]
    if not all(Path(source, "checkpoints", "latest").exists() for source in sources):
        warnings.warn(
            f"no checkpoints in {' and '.join(sources)} (run `make demo` first): starting from random "
            "weights",
            stacklevel=2,
        )
        config = replace(config, init=InitConfig())
    return replace(config, output=f"runs/tiny/{name}")


def image_flow() -> RunConfig:
    """Stage 0 on digits."""
    return _run(recipes.image_flow, "image_flow")


def image_consistency() -> RunConfig:
    """Stage 1 on digits."""
    return _run(recipes.image_consistency, "image_consistency")


def image() -> RunConfig:
    """Stage 2, APT, on digits."""
    return _run(recipes.image_apt, "image")


def video_flow() -> RunConfig:
    """Stage 0 on moving digits."""
    return _run(recipes.video_flow, "video_flow")


def video_consistency() -> RunConfig:
    """Stage 1 on moving digits."""
    return _run(recipes.video_consistency, "video_consistency")


def video() -> RunConfig:
    """Stage 2, APT, on moving digits."""
    return _run(recipes.video_apt, "video")
