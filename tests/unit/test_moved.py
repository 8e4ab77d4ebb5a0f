"""What was written before modules moved: recipes and scripts that import old names."""

import importlib
import os
import re
import subprocess
import sys

import pytest

from megatron_apt import moved
from megatron_apt.recipe_files import load_recipe

# As examples imported them in the first commits of this year; copies of them are in users' folders
OLD_RECIPE = """
from dataclasses import replace

from megatron_apt.config import AptConfig, ConsistencyConfig, DataConfig, FlowConfig, RunConfig
from megatron_apt.models.config import FluxConfig, ModelConfig, Sd3Config, WanConfig
from megatron_apt.models.config import flux_dev, hunyuan_video, sd35_medium, seaweed_8b, tiny, wan_1_3b


def run():
    return RunConfig(
        method="consistency",
        output="runs/old",
        model=wan_1_3b(),
        data=DataConfig(shards=("data",), text_length=512),
        consistency=ConsistencyConfig(steps=32, shift=5.0, guidance_scale=5.0),
        apt=AptConfig(ar1_sigma=0.02),
        flow=FlowConfig(),
    )
"""
NEW_RECIPE = """
from megatron_apt.config import DataConfig, RunConfig
from megatron_apt.families.wan.config import wan_1_3b
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.consistency.config import ConsistencyConfig


def run():
    return RunConfig(
        method="consistency",
        output="runs/old",
        model=wan_1_3b(),
        data=DataConfig(shards=("data",), text_length=512),
        consistency=ConsistencyConfig(steps=32, shift=5.0, guidance_scale=5.0),
        apt=AptConfig(ar1_sigma=0.02),
    )
"""
# Of old modules, with the module that has it now
NAMES = {
    "config.AptConfig": "methods.apt.config",
    "data.encode.EncodeConfig": "encode.config",
    "data.encode.encode": "encode.command",
    "data.rejected.RejectedInput": "encode.rejected",
    "launch.run_ranks": "demo.processes",
    "models.codec.PixelCodec": "encoders.codec",
    "models.codec.WanCodec": "families.wan.codec",
    "models.codec.load_codec": "encoders.load",
    "models.config.wan_14b": "families.wan.config",
    "models.families.build_backbone": "families.registry",
    "models.mmdit.Block": "models.joint",
    "models.pipeline_text.Sd3TextEncoder": "families.sd3.text",
    "models.text.open_text_encoder": "encoders.load",
    "optim.optimizers.RMSProp": "training.optimizers",
    "pipeline.command.ScheduleConfig": "plan.schedule",
    "pipeline.execute.Executor": "schedule.execute",
    "plan.PlanConfig": "plan.memory",
    "sample.load_generator": "sample.command",
    "sampling.Sampler": "sample.sampler",
    "train.Trainer": "training.train",
}


def modules_in(places):
    return [importlib.import_module(f"megatron_apt.{place}") for place in places]


@pytest.mark.parametrize("old", [*moved.MODULES, *moved.NAMES])
def test_old_modules_lead_to_modules_that_are_there(old):
    module = importlib.import_module(f"megatron_apt.{old}")
    assert (module.__spec__.origin == "moved") is (old in moved.MODULES)
    assert modules_in((moved.MODULES | moved.NAMES)[old])


@pytest.mark.parametrize("old", NAMES)
def test_a_moved_name_is_the_same_object_and_says_where_it_is(old):
    module, name = old.rsplit(".", 1)
    said = f"megatron_apt.{old} is megatron_apt.{NAMES[old]}.{name} now"
    with pytest.warns(FutureWarning, match=re.escape(said)):
        found = getattr(importlib.import_module(f"megatron_apt.{module}"), name)
    assert found is getattr(importlib.import_module(f"megatron_apt.{NAMES[old]}"), name)


def test_codecs_of_families_are_read_by_their_old_name():
    with pytest.warns(FutureWarning, match="VAE_CODECS"):
        from megatron_apt.models.codec import VAE_CODECS
    assert "wan" in VAE_CODECS


def test_an_old_recipe_is_what_it_was(tmp_path):
    for name, text in (("old", OLD_RECIPE), ("new", NEW_RECIPE)):
        (tmp_path / f"{name}.py").write_text(text)
    with pytest.warns(FutureWarning, match=r"is megatron_apt\.families\.wan\.config\.wan_1_3b now"):
        old = load_recipe(f"{tmp_path}/old.py:run")
    assert old == load_recipe(f"{tmp_path}/new.py:run")


@pytest.mark.parametrize("module", ["config", "models.config", "sample", "models.text"])
def test_names_that_never_were_are_missing(module):
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec(f"from megatron_apt.{module} import nothing")
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        importlib.import_module(f"megatron_apt.{module}_nothing")


def test_nothing_in_the_package_uses_an_old_name():
    """Nor warns, nor looks for one: the commands run with warnings of this kind as errors."""
    code = (
        "import sys, importlib, pkgutil, megatron_apt\n"
        "for module in pkgutil.walk_packages(megatron_apt.__path__, 'megatron_apt.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
        "moved = sys.modules.keys() & {f'megatron_apt.{name}' for name in megatron_apt.moved.MODULES}\n"
        "print(*moved)"
    )
    command = [sys.executable, "-W", "error:megatron_apt.:FutureWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
