"""What was written before modules moved: recipes and scripts that import old names."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from megatron_apt import moved
from megatron_apt.recipe_files import load_recipe

# As examples imported them in the first commits of this year; copies of them are in users' folders
OLD_IMPORTS = """
from megatron_apt.config import AptConfig, ConsistencyConfig, DataConfig, FlowConfig, RunConfig
from megatron_apt.models.config import FluxConfig, ModelConfig, Sd3Config, WanConfig
from megatron_apt.models.config import flux_dev, hunyuan_video, sd35_medium, seaweed_8b, tiny, wan_1_3b
"""
NEW_IMPORTS = """
from megatron_apt.config import DataConfig, RunConfig
from megatron_apt.families.wan.config import wan_1_3b
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.consistency.config import ConsistencyConfig
"""
RECIPE = """
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
    for name, text in (("old", OLD_IMPORTS + RECIPE), ("new", NEW_IMPORTS + RECIPE)):
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


def old_names(text):
    """What a module imports by an old name."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            module = str(node.module).removeprefix("megatron_apt.")
            taken = vars(importlib.import_module(node.module)) if module in moved.NAMES else {}
            if module in moved.MODULES:
                yield module
            yield from (
                f"{module}.{alias.name}"
                for alias in node.names
                if f"{module}.{alias.name}".removeprefix("megatron_apt.") in moved.MODULES
                or (taken and alias.name not in taken and not moved._is_submodule(node.module, alias.name))
            )


def test_nothing_here_uses_an_old_name():
    root = Path(moved.__file__).parents[1]
    files = [
        file
        for folder in ("megatron_apt", "kernels", "tools", "tests")
        for file in (root / folder).rglob("*.py")
    ]
    found = {
        str(file.relative_to(root)): used
        for file in files
        if file.name != "test_moved.py" and (used := [*old_names(file.read_text(encoding="utf-8"))])
    }
    assert len(files) > 300 and not found


def test_old_names_are_found():
    text = "from megatron_apt.models import codec\nfrom megatron_apt.train import train\n"
    text += "from megatron_apt.config import AptConfig, RunConfig\nfrom megatron_apt.plan import memory, plan"
    assert [*old_names(text)] == ["models.codec", "train", "config.AptConfig", "plan.plan"]
