"""A run and a dataset that an older version wrote: they are read, sampled and trained further.

older/run_and_dataset.tar.xz was written in November 2026, before checkpoints had an index
of their own and before shapes had families: two iterations of APT, of which the second
is only kept as the row of its log.
"""

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_apt.checkpoint import command as checkpoint
from megatron_apt.checkpoint import store
from megatron_apt.checkpoint.state import configuration_of
from megatron_apt.families.mmdit.config import MMDiTConfig
from megatron_apt.sample.command import sample_to_files
from megatron_apt.sample.config import SampleConfig
from megatron_apt.training.train import train
from support.runs import rows

ARCHIVE = Path(__file__).parent / "older" / "run_and_dataset.tar.xz"


@pytest.fixture
def older(tmp_path, monkeypatch):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_whole_and_says_what_it_holds(older, capsys):
    assert checkpoint.run(checkpoint.Verify("run")) == 0
    assert checkpoint.run(checkpoint.Inspect("run")) == 0
    assert "discriminator" in capsys.readouterr().out
    config = configuration_of(store.read_state(store.resolve("run"))["config"])
    assert config.model == MMDiTConfig(
        depth=2, width=12, heads=2, mlp_ratio=2, latent_channels=1, text_width=8
    )
    assert config.apt.head_layers == (0.5, 1.0) and config.data.text_length == 4


def test_it_is_trained_further_as_by_its_own_version(older, mesh):
    stored = configuration_of(store.read_state(store.resolve("run"))["config"])
    train(replace(stored, iterations=2), mesh)
    expected = json.loads((older / "expected.json").read_text())
    del expected["seconds"]
    assert rows("run")[-1] == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert store.read_state(store.resolve("run"))["iteration"] == 2


def test_it_is_sampled(older, mesh, tmp_path):
    options = {"checkpoint": "run", "prompts": ("a handwritten three",)}
    (picture,) = sample_to_files(SampleConfig(**options, out="samples"))
    shutil.move("run", "moved")  # as somebody else's copy
    (again,) = sample_to_files(SampleConfig(**options | {"checkpoint": "moved"}, out="again"))
    assert again.read_bytes() == picture.read_bytes()
