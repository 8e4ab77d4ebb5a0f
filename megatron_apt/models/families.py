"""The diffusion transformers there are, by name of their family."""

from megatron_apt.models.backbone import Backbone
from megatron_apt.models.config import ModelConfig
from megatron_apt.models.hunyuan import Hunyuan
from megatron_apt.models.mmdit import MMDiT
from megatron_apt.models.sd3 import Sd3
from megatron_apt.models.single_stream import SingleStream
from megatron_apt.models.stages import WHOLE, Cut
from megatron_apt.models.wan import Wan
from megatron_apt.parallel.mesh import Mesh

FAMILIES: dict[str, type[Backbone]] = {
    "mmdit": MMDiT,
    "wan": Wan,
    "sd3": Sd3,
    "flux": SingleStream,
    "hunyuan": Hunyuan,
}


def build_backbone(
    model: ModelConfig, mesh: Mesh, depth: int | None = None, output: bool = True, cut: Cut = WHOLE
) -> Backbone:
    """The diffusion transformer of this shape. Arguments as of Backbone."""
    return FAMILIES[model.family](model, mesh, depth, output, cut)
