"""Roles that several methods have."""

from megatron_apt.config import RunConfig
from megatron_apt.families.registry import build_backbone
from megatron_apt.methods.base import Role
from megatron_apt.models import parameters
from megatron_apt.models.backbone import Backbone
from megatron_apt.models.stages import Cut
from megatron_apt.parallel.mesh import Mesh


def build_generator(config: RunConfig, mesh: Mesh, cut: Cut) -> Backbone:
    """A diffusion transformer with weights drawn from the run's seed."""
    model = build_backbone(config.model, mesh, cut=cut)
    parameters.initialise(model, mesh, config.seed)
    return model


def generator(config: RunConfig, mesh: Mesh, source: str) -> Role:
    """The role that is trained, averaged, sampled and exported."""
    return Role(
        lambda cut: build_generator(config, mesh, cut),
        config.model.depth,
        source,
        optimizer=config.optimizer,
        ema=config.optimizer.ema > 0,
    )
