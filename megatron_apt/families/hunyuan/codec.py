"""AutoencoderKLHunyuanVideo, the codec of HunyuanVideo pipelines."""

from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from megatron_apt import schema
from megatron_apt.encoders.codec import Side, VaeCodec, read_fields


class _HunyuanFields(msgspec.Struct):
    latent_channels: schema.Positive
    scaling_factor: float
    temporal_compression_ratio: Side
    spatial_compression_ratio: Side


class HunyuanCodec(VaeCodec):
    """AutoencoderKLHunyuanVideo: videos; x * scaling_factor.

    With or without tiling, diffusers cuts clips of more than 16 frames into overlapping
    pieces of 17 and blends their latents, or their pixels.
    """

    kind, class_name = "hunyuan", "AutoencoderKLHunyuanVideo"

    def _read(self, folder: Path, config: Any) -> None:
        config = read_fields(config, _HunyuanFields, folder)
        for name in ("temporal_compression_ratio", "spatial_compression_ratio"):
            if (ratio := getattr(config, name)).bit_count() != 1:
                raise ValueError(
                    f"{folder}/config.json: {name}={ratio}: must be a power of 2; download it again"
                )
        self.latent_channels, self._scale = config.latent_channels, config.scaling_factor
        self._temporal, self._spatial = config.temporal_compression_ratio, config.spatial_compression_ratio

    def _tile(self, side: int) -> None:
        stride = side * 3 // 4
        self.vae.enable_tiling(side, side, tile_sample_stride_height=stride, tile_sample_stride_width=stride)

    def _normalised(self, mode: Tensor) -> Tensor:
        return mode * self._scale

    def _raw(self, latent: Tensor) -> Tensor:
        return latent.to(self.vae.dtype) / self._scale  # in the VAE's precision, as HunyuanVideoPipeline does


CODEC = HunyuanCodec
