"""The stages that examples are built of, and that every function of an example is a recipe."""

from pathlib import Path

import pytest
import tyro

from megatron_apt.config import DataConfig, InitConfig, RunConfig, check_fits
from megatron_apt.families.wan.config import wan_5b, wan_5b_i2v
from megatron_apt.methods.recipes import after, distilled, paper_images, paper_videos
from megatron_apt.recipe_files import load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
STAGES = ("consistency", "image", "video")
RECIPES = [
    *(f"{file}.py:{stage}" for file in ("image", "video") for stage in ("flow", "consistency", "apt")),
    *(f"{file}.py:{stage}" for file in ("flux", "sd35") for stage in ("consistency", "apt")),
    *(f"sd35.py:{stage}_large" for stage in ("consistency", "apt")),
    *(f"{file}.py:{stage}" for file in ("hunyuan", "wan") for stage in STAGES),
    *(f"wan.py:{stage}_14b" for stage in STAGES),
    *(f"wan.py:{stage}_i2v_{size}" for stage in ("consistency", "video") for size in ("14b", "5b")),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_examples_are_recipes_of_the_papers_stages(recipe):
    run = load_recipe(f"{EXAMPLES}/{recipe}")
    check_fits(run)
    assert run.output.startswith("runs/")
    if run.method == "apt":
        pictures = run.data.shards == ("data/images",)
        assert (run.iterations, run.optimizer.lr, run.apt.ar1_sigma, run.apt.timestep_shift) == (
            (350, 5e-6, 0.01, 1.0) if pictures else (300, 3e-6, 0.1, 12.0)
        )
        assert run.apt.ar1_lambda == 100.0
        assert (run.optimizer.kind, run.optimizer.alpha, run.optimizer.ema) == ("rmsprop", 0.9, 0.995)


@pytest.mark.parametrize("stage", ["consistency", "video"])
def test_wans_image_to_video(stage):
    model = load_recipe(f"{EXAMPLES}/wan.py:{stage}_i2v_14b").model
    assert (model.condition_channels, model.image_width) == (20, 1280)
    run = load_recipe(f"{EXAMPLES}/wan.py:{stage}_i2v_5b")
    assert run.model == wan_5b_i2v()
    assert tyro.cli(RunConfig, default=run, args=["--model.no-first-frame"]).model == wan_5b()


def test_a_stage_starts_from_the_one_before():
    base = RunConfig(output="runs/a", init=InitConfig(diffusion="runs/pretrained"))
    first = distilled(base, shift=7.0, guidance_scale=1.0)
    assert (first.consistency.shift, first.consistency.guidance_scale, first.output) == (7.0, 1.0, "runs/a")
    second = paper_images(first, output="runs/b", init=after(first))
    assert second.init == InitConfig(generator="runs/a", diffusion="runs/pretrained")
    clips = DataConfig(shards=("clips",))
    third = paper_videos(second, output="runs/c", init=after(second), data=clips, iterations=7)
    assert third.init == InitConfig(generator="runs/b:ema", diffusion="runs/pretrained")
    # What is given goes before the paper's
    assert (third.iterations, third.data, third.method) == (7, clips, "apt")
