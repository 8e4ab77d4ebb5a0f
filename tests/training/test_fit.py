"""What a recipe leaves open is its checkpoint's and its dataset's; what it gives is compared with them."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_apt.checkpoint import store
from megatron_apt.config import DataConfig, InitConfig, RunConfig
from megatron_apt.data.encoding import KeptEncoding, keep
from megatron_apt.data.shards import LatentShards
from megatron_apt.families.mmdit.config import MMDiTConfig
from megatron_apt.families.sd3.config import Sd3Config
from megatron_apt.families.wan.config import WanConfig
from megatron_apt.models.config import ModelConfig
from megatron_apt.sample.command import sample_to_files
from megatron_apt.sample.config import SampleConfig
from megatron_apt.training.fit import fitted, from_checkpoint
from megatron_apt.training.train import train
from support.runs import config


@pytest.fixture(scope="module")
def run(mesh, datasets, tmp_path_factory):
    """A run of one iteration whose recipe left the widths open."""
    output = tmp_path_factory.mktemp("fit") / "flow"
    model = MMDiTConfig(depth=3, width=48, modulation="single")
    data = DataConfig(shards=(str(datasets / "images"),))
    run_config = config(datasets, output, "flow", iterations=1, model=model, data=data)
    train(run_config, mesh)
    return run_config


def test_widths_are_those_of_the_dataset(run):
    found = from_checkpoint(run.output)
    assert found == replace(run.model, latent_channels=4, text_width=8)
    assert fitted(run).data.text_length == 0
    given = replace(run, model=replace(run.model, latent_channels=3))
    assert fitted(given).model.latent_channels == 3  # which the dataset's reader refuses by name


def test_the_same_recipe_continues(run, mesh):
    train(replace(run, iterations=2), mesh)
    assert store.read_state(store.resolve(run.output))["iteration"] == 2


def test_a_model_that_is_not_chosen_is_the_checkpoints(run, datasets, tmp_path):
    base = config(datasets, tmp_path, data=run.data)
    for init in (InitConfig(diffusion=f"{run.output}:ema"), InitConfig(generator=f"{run.output}:raw")):
        open_run = replace(base, model=ModelConfig(recompute="full"), init=init)
        assert fitted(open_run).model == replace(from_checkpoint(run.output), recompute="full")
    own = replace(base, model=ModelConfig(), output=run.output)
    assert fitted(own).model == from_checkpoint(run.output)
    small = fitted(replace(base, model=ModelConfig(depth=2), init=InitConfig()))
    assert small.model == MMDiTConfig(depth=2, latent_channels=4, text_width=8)


def test_a_checkpoints_shape_may_be_changed_in_fields_that_it_has(run):
    assert from_checkpoint(run.output, recompute="full").recompute == "full"
    with pytest.raises(ValueError, match="of family 'mmdit', which has no first_frame, guidance"):
        from_checkpoint(run.output, guidance=1.0, first_frame=True)
    with pytest.raises(store.CheckpointError, match="nowhere"):
        from_checkpoint("nowhere")


@pytest.mark.parametrize(("model", "length"), [(WanConfig(), 512), (Sd3Config(), 333), (MMDiTConfig(), 0)])
def test_captions_are_padded_as_the_familys_pipelines_do(model, length):
    model = replace(model, latent_channels=4, text_width=8)
    assert fitted(RunConfig(model=model)).data.text_length == length
    assert fitted(RunConfig(model=model, data=DataConfig(text_length=7))).data.text_length == 7


def test_what_nothing_tells_is_named():
    with pytest.raises(
        ValueError, match=r"model\.latent_channels=0: is left open, and data\.shards names no"
    ):
        fitted(RunConfig())
    with pytest.raises(ValueError, match=r"model\.text_width=0: is left open"):
        fitted(RunConfig(model=MMDiTConfig(latent_channels=4)))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        fitted(RunConfig(data=DataConfig(shards=("nowhere",))))


# --- samples of a run whose dataset is not where the recipe says


def test_samples_are_made_from_anywhere_and_without_the_dataset(run, datasets, mesh, tmp_path, monkeypatch):
    data, output = tmp_path / "data", tmp_path / "run"
    shutil.copytree(datasets / "images", data)
    monkeypatch.chdir(tmp_path)
    train(replace(run, output="run", data=DataConfig(shards=("data",))), mesh)
    options = {"checkpoint": str(output), "prompts": ("a handwritten seven",), "steps": 2}
    monkeypatch.chdir("/")
    (there,) = sample_to_files(SampleConfig(**options, out=str(tmp_path / "there")))
    data.rename(tmp_path / "elsewhere")
    (kept,) = sample_to_files(SampleConfig(**options, out=str(tmp_path / "kept")))
    assert kept.read_bytes() == there.read_bytes()
    (captioned, *_) = sample_to_files(
        SampleConfig(**options | {"prompts": ()}, out=str(tmp_path / "captions"))
    )
    assert "handwritten" in captioned.name
    shutil.rmtree(output / "encoding")
    with pytest.raises(FileNotFoundError, match="data does not exist"):
        sample_to_files(SampleConfig(**options, out=str(tmp_path / "gone")))


def test_a_kept_encoding_that_is_damaged_is_named(run, tmp_path):
    shutil.copytree(Path(run.output) / "encoding", tmp_path / "encoding")
    (tmp_path / "encoding/examples.json").write_text('{"shape": [1, 1, 8], "captions": []}')
    with pytest.raises(ValueError, match=r"examples\.json: shape: .* give the run's dataset with --dataset"):
        KeptEncoding(tmp_path / "encoding")


def test_another_dataset_in_the_same_folder_is_kept_anew(run, datasets, tmp_path):
    keep(LatentShards(datasets / "images"), tmp_path)
    keep(LatentShards(datasets / "videos"), tmp_path)
    assert KeptEncoding(tmp_path / "encoding").shapes == LatentShards(datasets / "videos").shapes[:1]
