"""What has been measured so far, as results.json and as the report."""

import math
from pathlib import Path

import torch
from torch import Tensor

from megatron_apt.demo import suite
from megatron_apt.demo.content import FLOOR, REAL, Report, Row, Section
from megatron_apt.demo.files import Progress
from megatron_apt.demo.plots import tail_median
from megatron_apt.demo.recipes import Place
from megatron_apt.demo.suite import SEED, SUITES, RealData
from megatron_apt.evaluate.diversity import pairwise_diversity
from megatron_apt.evaluate.frechet import real_floor
from megatron_apt.training.log import read_rows

TITLE = "From diffusion model to one-step generator"
SHOWN_FPS = 4.0  # of clips: half their own rate, so that the eye can follow so few frames
_NOTES = (
    "Fréchet distances are taken in pixels for images and in 2 x 2 pooled latents for clips; the two cannot "
    "be compared with each other.",
    "All rows use EMA weights, the same captions and the same noise, without guidance; distillation folds in "
    "a guidance of 2.",
)


def demo_results(here: Place, progress: Progress) -> dict:
    """The content of results.json."""
    results: dict = {"quick": progress["quick"]}
    if "machine" in progress:
        results["machine"] = progress["machine"]
    for section in SUITES:
        if figures := _figures(here, section):
            results[section] = figures
    losses = {
        name: _last_d_loss(here, run)
        for name, run in (("d_loss_with_ar1", "images/apt"), ("d_loss_without_ar1", "images/apt_without_ar1"))
    }
    results["collapse"] = {name: loss for name, loss in losses.items() if not math.isnan(loss)}
    seconds = progress["seconds"]
    results["seconds"] = {**seconds, "total": round(sum(seconds.values()), 2)}
    return results


def _figures(here: Place, section: str) -> dict:
    """Those of a section by kind and row; empty before anything is measured."""
    measured = {
        row.key: numbers
        for row in SUITES[section]
        if (numbers := suite.read_numbers(here, section, row)) is not None
    }
    if not measured:
        return {}
    real = suite.real_data(here.data(section))
    return {
        "fd": {key: numbers["frechet"] for key, numbers in measured.items()},
        "accuracy": {key: numbers["accuracy"] for key, numbers in measured.items()},
        "diversity": {key: numbers["diversity"] for key, numbers in measured.items()},
        "fd_real_halves": real_floor(real.features, SEED),
        "accuracy_real": real.classifier.real_accuracy,
    }


def _last_d_loss(here: Place, run: str) -> float:
    """Where a run's discriminator loss ended; NaN before it has."""
    return tail_median(_curve(here, run), "d/loss")


def _curve(here: Place, run: str) -> list[dict]:
    file = Path(here.root) / run / "log.jsonl"
    return read_rows(file) if file.exists() or file.is_symlink() else []


def demo_report(here: Place, progress: Progress, pending: tuple[str, ...], config_text: str) -> Report:
    """Everything measured so far."""
    begun = [name for name in SUITES if (Path(here.data(name)) / "dataset.json").exists()]
    return Report(
        TITLE,
        tuple(_section(here, name) for name in begun),
        progress["seconds"],
        config_text,
        _NOTES,
        pending,
        trial=progress["quick"],
        machine=progress.get("machine"),
    )


def _section(here: Place, name: str) -> Section:
    real = suite.real_data(here.data(name))
    shown = suite.shown_samples(real.shards)
    latents, table = {REAL: real.latents[shown]}, [_real_row(real)]
    for row in SUITES[name]:
        if numbers := suite.read_numbers(here, name, row):
            latents[row.title] = suite.read_shown(here, name, row, suite.shape_shown(real))
            cost = (row.nfe, numbers["seconds_per_sample"])
            table.append(Row(row.title, numbers["frechet"], numbers["accuracy"], numbers["diversity"], *cost))
    prompts = tuple(real.shards.captions[i] for i in shown)
    stages = {"diffusion": f"{name}/flow", "consistency": f"{name}/consistency", "APT": f"{name}/apt"}
    curves = {stage: rows for stage, run in stages.items() if (rows := _curve(here, run))}
    ablation = _curve(here, f"{name}/apt_without_ar1")
    return Section(name, prompts, _decoded(real, latents), SHOWN_FPS, tuple(table), curves, ablation)


def _real_row(real: RealData) -> Row:
    return Row(
        FLOOR,
        real_floor(real.features, SEED),
        real.classifier.real_accuracy,
        pairwise_diversity(real.features),
        math.nan,
        math.nan,
    )


def _decoded(real: RealData, latents: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pixels (n, 3, F, H, W) in [-1, 1] of latents (n, C, F, H, W)."""
    codec = real.shards.codec()
    return {
        name: torch.stack([codec.decode(latent).clamp(-1, 1) for latent in batch])
        for name, batch in latents.items()
    }
