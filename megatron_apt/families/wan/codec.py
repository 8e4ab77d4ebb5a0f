"""AutoencoderKLWan, the codec of Wan pipelines."""

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from megatron_apt import schema
from megatron_apt.encoders.codec import Side, VaeCodec, read_fields


class _WanFields(msgspec.Struct):
    z_dim: schema.Positive
    temperal_downsample: list[bool]  # spelt so in diffusers
    dim_mult: list[schema.Positive]
    latents_mean: list[float]
    latents_std: list[float]
    patch_size: Side | None = None


class WanCodec(VaeCodec):
    """AutoencoderKLWan: videos; (x - latents_mean) / latents_std per channel."""

    kind, class_name = "wan", "AutoencoderKLWan"

    def _read(self, folder: Path, config: Any) -> None:
        config = read_fields(config, _WanFields, folder)
        self.latent_channels = config.z_dim
        self._temporal = 2 ** sum(config.temperal_downsample)
        self._patch = config.patch_size or 1  # Wan2.2's TI2V folds 2 x 2 pixels into channels first
        self._spatial = 2 ** (len(config.dim_mult) - 1) * self._patch
        self._mean, self._std = (
            torch.tensor(v, device=self.device).view(-1, 1, 1, 1)
            for v in (config.latents_mean, config.latents_std)
        )

    @property
    def given_channels(self) -> int:
        """Channels of `given`."""
        return self._temporal + self.latent_channels

    def given(self, frame: Tensor, frames: int) -> Tensor:
        """What image-to-video models read beside a clip's latents, as
        WanImageToVideoPipeline.prepare_latents makes it.

        A mask, 1 where a pixel frame is known, one channel for each pixel frame of a
        latent frame (the first frame stands alone, so it counts for all of its latent
        frame's); then the latents of a clip of that frame and grey.

        Args:
            frame: (3, 1, H, W) in [-1, 1].
            frames: pixel frames of the clip.

        Returns:
            (temporal + c, f, h, w) float32 on the CPU.
        """
        clip = torch.cat((frame, frame.new_zeros(3, frames - 1, *frame.shape[2:])), dim=1)
        latent = self.encode(clip)
        mask = latent.new_zeros(self._temporal, *latent.shape[1:])
        mask[:, 0] = 1
        return torch.cat((mask, latent))

    def _tile(self, side: int) -> None:
        self.vae.enable_tiling(side, side, side * 3 // 4, side * 3 // 4)

    def _mode(self, pixels: Tensor) -> Tensor:
        if self.tiling:
            # Diffusers cuts what is folded already, but decodes to pixels
            self._tile(self.tiling // self._patch)
        return super()._mode(pixels)

    def _pixels(self, raw: Tensor) -> Tensor:
        if self.tiling:
            self._tile(self.tiling)
        return super()._pixels(raw)

    def _normalised(self, mode: Tensor) -> Tensor:
        return (mode - self._mean) / self._std

    def _raw(self, latent: Tensor) -> Tensor:
        return latent * self._std + self._mean


CODEC = WanCodec
