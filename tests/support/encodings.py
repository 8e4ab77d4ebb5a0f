"""Encoded pictures with text of a pipeline's encoders, and a run on them."""

import json
import shutil
from dataclasses import replace

from megatron_apt.config import DataConfig, OptimizerConfig, RunConfig
from support.pipelines import PROMPTS
from support.problems import model_config


def through_json(config: dict) -> dict:
    return json.loads(json.dumps(config))


def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / folder.name)


DIRTY = [
    *PROMPTS,
    "  a\n red\t\xa0fox ",
    "&lt;b&gt; the quick &amp;amp; brown",
    "<extra_id_0> runs </s> over",
    "日本 é",
]


def run(folder, out="", **changes) -> RunConfig:
    """Flow matching on the encoded digits. The pooled text is as wide as the text, 48,
    which every model takes.
    """
    base = RunConfig(
        method="flow",
        output=str(out),
        iterations=2,
        global_batch=4,
        micro_batch=4,
        model=model_config(text_width=48),
        data=DataConfig(shards=(str(folder),)),
        optimizer=OptimizerConfig(kind="adamw", lr=1e-3, ema=0.9),
        tensorboard=False,
    )
    return replace(base, **changes)
