"""A run's model and captions as its checkpoint and its dataset have them, where a recipe leaves them open."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron_apt.checkpoint import store
from megatron_apt.checkpoint.state import model_of
from megatron_apt.config import RunConfig
from megatron_apt.data.shards import LatentShards
from megatron_apt.families import registry
from megatron_apt.models.config import ModelConfig


def from_checkpoint(source: str | Path, **changes: Any) -> ModelConfig:
    """The shape of a checkpoint's model, for a recipe.

    Args:
        source: a checkpoint or run folder; `:ema` or `:raw` behind it makes no difference.
        changes: fields that are to be otherwise, e.g. recompute="full".

    Raises:
        CheckpointError: nothing there, or its state.json describes no model.
        ValueError: a field that this family does not have.
    """
    folder = store.resolve(str(source).removesuffix(":ema").removesuffix(":raw"))
    model = model_of(store.read_state(folder)["config"]["model"], f"{folder}/state.json", "config.model")
    unknown = changes.keys() - {field.name for field in fields(model)}
    if unknown:
        raise ValueError(
            f"{source}: holds a model of family {model.family!r}, which has no {', '.join(sorted(unknown))}"
        )
    return replace(model, **changes)


def fitted(config: RunConfig) -> RunConfig:
    """The configuration with nothing left open.

    A model that is not chosen is that of the run's own checkpoint, else that of
    init.diffusion or init.generator, else a small one. Latent channels and text width are
    the dataset's; captions are padded as the family's pipelines pad them.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: what is to be taken from a checkpoint
            or a dataset is not there.
    """
    model = _widths(_chosen(config), config)
    length = config.data.text_length
    if length is None:
        length = model.text_padding or 0
    return replace(config, model=model, data=replace(config.data, text_length=length))


def _chosen(config: RunConfig) -> ModelConfig:
    if config.model.family:
        return config.model
    given = {
        field.name: value
        for field in fields(ModelConfig)
        if (value := getattr(config.model, field.name)) != field.default
    }
    own = store.latest(config.output)
    for source in (own, config.init.diffusion, config.init.generator):
        if source:
            return from_checkpoint(source, **given)
    return registry.DEFAULT(**given)


def _widths(model: ModelConfig, config: RunConfig) -> ModelConfig:
    """What only the dataset knows."""
    wanted = [name for name in ("latent_channels", "text_width") if not getattr(model, name)]
    if not wanted:
        return model
    if not config.data.shards:
        raise ValueError(
            f"model.{wanted[0]}=0: is left open, and data.shards names no dataset that it could be taken "
            "from; give one of the two"
        )
    dataset = LatentShards(config.data.shards[0])
    found = {"latent_channels": dataset.shapes[0][0], "text_width": dataset.null_text.shape[-1]}
    return replace(model, **{name: found[name] for name in wanted})
