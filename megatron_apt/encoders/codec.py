"""Codecs: pixels in [-1, 1] to latents and back.

Shapes: pixels (3, F, H, W), latents (c, f, h, w), each with any number of leading batch
axes for PixelCodec and at most one for VAEs. Codecs are causal in time: F = 1 + k *
temporal pixel frames are 1 + k latent frames, so that an image is the case k = 0.
PixelCodec can also cut clips into whole groups, F = k * temporal, where no latent frame
has components that are always zero.
"""

import abc
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from megatron_apt import schema
from megatron_apt.encoders.foreign_folder import checked_model_folder, load_frozen

LUMA = (0.299, 0.587, 0.114)  # BT.601; the weights sum to 1, so a grey picture keeps its value


@dataclass(frozen=True)
class PixelCodecConfig:
    """Settings of PixelCodec.

    Attributes:
        channels: 3 keeps RGB; 1 keeps luma only, which is lossless for grey sources.
        temporal: pixel frames of one latent frame (with causal: after the first).
        causal: the first frame stands alone. It then leaves all but one time component of
            its latent frame at zero in every sample, which a discriminator can tell from
            a generator's nearly zero; for adversarial training on pixel latents, turn it
            off.
        spatial: side of the pixel block that becomes one latent position.
        shift: mean pixel value of the data, in [-1, 1]; taken off the constant component
            only, since every other one has mean 0.
        scale: divides all coefficients, so that latents have about unit variance.
    """

    channels: int = 3
    temporal: int = 4
    causal: bool = True
    spatial: int = 1
    shift: float = 0.0
    scale: float = 1.0

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise ValueError(f"pixel codec: channels={self.channels}; use 3 (RGB) or 1 (luma)")
        for name in ("temporal", "spatial"):
            if getattr(self, name) < 1:
                raise ValueError(f"pixel codec: {name}={getattr(self, name)} must be at least 1")
        if not (self.scale > 0 and math.isfinite(self.scale) and math.isfinite(self.shift)):
            raise ValueError(
                f"pixel codec: scale={self.scale}, shift={self.shift}; use a positive scale and a finite "
                "shift"
            )


def dct_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II, (size, size) float64: row k holds sqrt(2 / size) cos(pi (2 n +
    1) k / (2 size)), row 0 divided by sqrt(2).
    """
    n = torch.arange(size, dtype=torch.float64)
    matrix = math.sqrt(2 / size) * torch.cos(math.pi * (2 * n + 1) * n[:, None] / (2 * size))
    matrix[0] /= math.sqrt(2)
    return matrix


def latent_shape_of(
    size: tuple[int, int, int], channels: int, temporal: int, spatial: int, causal: bool = True
) -> tuple[int, int, int, int]:
    """(c, f, h, w) of pixels of size (F, H, W).

    Raises:
        ValueError: sizes that the codec cannot cut evenly, with the nearest that it can.
    """
    frames, height, width = size
    if not causal:
        if frames < 1 or frames % temporal:
            nearest = temporal * max(1, round(frames / temporal))
            raise ValueError(
                f"frames={frames} is not a multiple of {temporal}; the nearest legal count is {nearest}"
            )
    elif frames < 1 or (frames - 1) % temporal:
        nearest = 1 + temporal * max(0, round((frames - 1) / temporal))
        raise ValueError(
            f"frames={frames} is not 1 + a multiple of {temporal}; the nearest legal count is {nearest}"
        )
    for name, value in (("height", height), ("width", width)):
        if value < 1 or value % spatial:
            nearest = spatial * max(1, round(value / spatial))
            raise ValueError(
                f"{name}={value} is not a multiple of {spatial}; the nearest legal {name} is {nearest}"
            )
    return channels, -(-frames // temporal), height // spatial, width // spatial


class PixelCodec:
    """Invertible codec without weights: an orthonormal DCT over time and over spatial
    blocks.

    With config.causal the first frame stands alone, as if it were repeated `temporal`
    times: its constant component is frame * sqrt(temporal), the others are 0. Latent
    channel index = (channel * temporal + time frequency) * spatial^2 + (vertical
    frequency * spatial + horizontal frequency). decode inverts encode to better than
    1e-5, so 8-bit sources come back exactly after rounding.
    """

    def __init__(self, config: PixelCodecConfig = PixelCodecConfig()):
        self.config = config
        self.latent_channels = config.channels * config.temporal * config.spatial**2
        time, space = dct_matrix(config.temporal), dct_matrix(config.spatial)
        # n, m, q: frequencies of time, rows and columns; t, i, j: positions in time, rows and columns.
        self._basis = torch.einsum("nt,mi,qj->nmqtij", time, space, space).float()
        # The constant component of a block of ones is sqrt(number of pixels in it).
        self._shift = config.shift * math.sqrt(config.temporal) * config.spatial

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Raises ValueError for sizes that do not fit."""
        return latent_shape_of(
            (frames, height, width),
            self.latent_channels,
            self.config.temporal,
            self.config.spatial,
            self.config.causal,
        )

    def pixel_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(F, H, W) of the clips whose latents are of this size."""
        first = 1 if self.config.causal else self.config.temporal
        return (
            first + (frames - 1) * self.config.temporal,
            height * self.config.spatial,
            width * self.config.spatial,
        )

    def config_dict(self) -> dict:
        return {"kind": "pixel", **asdict(self.config)}

    def encode(self, pixels: Tensor) -> Tensor:
        """(..., 3, F, H, W) in [-1, 1] to (..., c, f, h, w) float32."""
        c, f, h, w = self.latent_shape(*pixels.shape[-3:])
        t, s, k = self.config.temporal, self.config.spatial, self.config.channels
        x = pixels.float()
        if k == 1:
            grey = (weight * x[..., i : i + 1, :, :, :] for i, weight in enumerate(LUMA))
            x = sum(grey, start=x.new_zeros(()))
        if self.config.causal:
            x = torch.cat(
                (x[..., :1, :, :].expand(*x.shape[:-3], t, *x.shape[-2:]), x[..., 1:, :, :]), dim=-3
            )
        x = x.unflatten(-3, (f, t)).unflatten(-2, (h, s)).unflatten(-1, (w, s))
        x = torch.einsum("nmqtij,...cfthiwj->...cnmqfhw", self._basis, x)
        x = x.reshape(*pixels.shape[:-4], k, t * s * s, f, h, w).clone()
        x[..., 0, :, :, :] -= self._shift
        return x.reshape(*pixels.shape[:-4], c, f, h, w) / self.config.scale

    def decode(self, latent: Tensor) -> Tensor:
        """(..., c, f, h, w) to (..., 3, F, H, W) float32, not clipped."""
        t, s, k = self.config.temporal, self.config.spatial, self.config.channels
        if latent.shape[-4] != self.latent_channels:
            raise ValueError(
                f"latent has {latent.shape[-4]} channels, this pixel codec has {self.latent_channels}; "
                "decode it with the codec of its dataset"
            )
        x = (latent.float() * self.config.scale).unflatten(-4, (k, t * s * s)).clone()
        x[..., 0, :, :, :] += self._shift
        x = x.unflatten(-4, (t, s, s))
        x = torch.einsum("nmqtij,...cnmqfhw->...cfthiwj", self._basis, x)
        x = x.flatten(-2).flatten(-3, -2)  # columns, then rows
        x = x.flatten(-4, -3)
        if self.config.causal:
            # A generator's first latent frame may hold more than its constant component;
            # its average over time is what the encoder would see.
            x = torch.cat((x[..., :t, :, :].mean(-3, keepdim=True), x[..., t:, :, :]), dim=-3)
        return x.expand(*x.shape[:-4], 3, *x.shape[-3:]).contiguous() if k == 1 else x


class VaeCodec(abc.ABC):
    """A VAE of diffusers from a local folder; latents are normalised with the numbers in
    its config.json. See WanCodec, HunyuanCodec and KlCodec.

    Args:
        path: the VAE's folder (config.json and diffusion_pytorch_model*.safetensors), or
            a pipeline's with the VAE in vae/. Nothing is downloaded and no pickle is
            read.
        device: where the model runs; encode and decode return CPU tensors.
        dtype: "float32" or "bfloat16".
        tiling: side in pixels of the square tiles that are encoded and decoded one after
            the other, a quarter of each blended into the next, and samples one by one; 0:
            whole. Bounds the memory of large pictures; a tile does not see the rest, so
            values differ from the whole's.

    Raises:
        FileNotFoundError, ValueError: naming what is missing in the folder, or a tile
            that the VAE cannot cut.
    """

    kind = class_name = ""
    latent_channels: int
    _temporal: int  # frames, and pixels of a side, that become one
    _spatial: int

    def __init__(self, path: str | Path, device: str = "cpu", dtype: str = "float32", tiling: int = 0):
        import diffusers  # seconds to import, and only these codecs need it

        folder = checked_model_folder(component_folder(path, "vae"), self.class_name)
        self.path, self.device, self.dtype, self.tiling = str(path), device, dtype, tiling
        self.vae = load_frozen(
            getattr(diffusers, self.class_name), folder, device, torch_dtype=getattr(torch, dtype)
        )
        self._read(folder, self.vae.config)
        if tiling:
            # Tiles advance by three quarters of their side, which must be whole latent positions.
            unit = 4 * self._spatial
            if tiling < 0 or tiling % unit:
                raise ValueError(
                    f"tiling={tiling}: use 0 (off) or a multiple of {unit} pixels, such as "
                    f"{unit * max(1, round(tiling / unit))}"
                )
            self._tile(tiling)
            self.vae.enable_slicing()

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Raises ValueError for sizes that do not fit."""
        return latent_shape_of((frames, height, width), self.latent_channels, self._temporal, self._spatial)

    def pixel_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(F, H, W) of the clips whose latents are of this size."""
        return 1 + (frames - 1) * self._temporal, height * self._spatial, width * self._spatial

    def config_dict(self) -> dict:
        config = {"kind": self.kind, "path": self.path, "dtype": self.dtype}
        return config | ({"tiling": self.tiling} if self.tiling else {})

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(3, F, H, W) in [-1, 1], or a batch of them, to normalised latents: the mode of
        the posterior, float32 on the CPU.
        """
        self.latent_shape(*pixels.shape[-3:])
        batch = pixels if pixels.dim() == 5 else pixels[None]
        mode = self._mode(batch.to(self.device, self.vae.dtype)).float()
        return self._normalised(mode).cpu().view(*pixels.shape[:-4], *mode.shape[1:])

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latents to pixels clipped to [-1, 1], float32 on the CPU."""
        batch = latent if latent.dim() == 5 else latent[None]
        if batch.shape[1] != self.latent_channels:
            raise ValueError(
                f"latent has {batch.shape[1]} channels, {self.path} has {self.latent_channels}; decode it "
                "with the codec of its dataset"
            )
        pixels = (
            self._pixels(self._raw(batch.to(self.device).float()).to(self.vae.dtype)).float().clamp(-1, 1)
        )
        return pixels.cpu().view(*latent.shape[:-4], *pixels.shape[1:])

    @property
    def given_channels(self) -> int:
        """Channels of what image-to-video models read beside a clip's latents; 0 of others."""
        return 0

    @abc.abstractmethod
    def _read(self, folder: Path, config: Any) -> None:
        """Sets the attributes above from the VAE's configuration."""

    @abc.abstractmethod
    def _tile(self, side: int) -> None:
        """Makes the VAE work in tiles of so many pixels."""

    @abc.abstractmethod
    def _normalised(self, mode: Tensor) -> Tensor:
        """What a diffusion model sees of the VAE's latents."""

    @abc.abstractmethod
    def _raw(self, latent: Tensor) -> Tensor:
        """Undoes `_normalised`."""

    def _mode(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels).latent_dist.mode()

    def _pixels(self, raw: Tensor) -> Tensor:
        return self.vae.decode(raw).sample


Side = Annotated[int, msgspec.Meta(ge=1, le=256)]  # pixels that become one


class _KlFields(msgspec.Struct):
    latent_channels: schema.Positive
    block_out_channels: list[schema.Positive]
    scaling_factor: float
    shift_factor: float | None = None


def read_fields(config: Any, kind: type, folder: Path):
    """What a codec reads of a VAE's config.json.

    Raises:
        ValueError: naming the field.
    """
    fields = schema.convert(dict(config), kind, f"{folder}/config.json", remedy="download it again")
    for name in ("scaling_factor", "latents_std", "shift_factor", "latents_mean"):
        value = getattr(fields, name, None)
        values = value if isinstance(value, list) else [] if value is None else [value]
        divides = name in ("scaling_factor", "latents_std")
        if any(not math.isfinite(number) or (divides and number <= 0) for number in values):
            raise ValueError(
                f"{folder}/config.json: {name}={value}: must be {'above 0' if divides else 'finite'}; "
                "download it again"
            )
        if isinstance(value, list) and len(value) != fields.z_dim:
            raise ValueError(
                f"{folder}/config.json: {name} has {len(value)} numbers, z_dim={fields.z_dim}; download it "
                "again"
            )
    return fields


class KlCodec(VaeCodec):
    """AutoencoderKL, the VAE of Stable Diffusion 3 and Flux: pictures, as clips of one
    frame; (x - shift_factor) * scaling_factor.

    A missing shift is 0.
    """

    kind, class_name = "kl", "AutoencoderKL"

    def _read(self, folder: Path, config: Any) -> None:
        if config.latents_mean is not None or config.latents_std is not None:
            raise ValueError(
                f"{folder}/config.json: has latents_mean or latents_std; codec 'kl' knows shift_factor and "
                "scaling_factor only"
            )
        config = read_fields(config, _KlFields, folder)
        self.latent_channels = config.latent_channels
        self._temporal, self._spatial = 1, 2 ** (len(config.block_out_channels) - 1)
        self._shift, self._scale = config.shift_factor or 0.0, config.scaling_factor

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(c, 1, h, w); raises ValueError for sizes that do not fit."""
        if frames != 1:
            raise ValueError(
                f"frames={frames}: codec 'kl' encodes pictures; use frames=1, or a codec of videos"
            )
        return super().latent_shape(frames, height, width)

    def _tile(self, side: int) -> None:
        self.vae.enable_tiling()
        # diffusers' tile is the config's sample_size, 1024 in both, and has no argument.
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = side, side // self._spatial

    def _mode(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels.squeeze(2)).latent_dist.mode().unsqueeze(2)

    def _pixels(self, raw: Tensor) -> Tensor:
        if raw.shape[2] != 1:
            raise ValueError(f"latent has {raw.shape[2]} frames; codec 'kl' decodes pictures, which have 1")
        return self.vae.decode(raw.squeeze(2)).sample.unsqueeze(2)

    def _normalised(self, mode: Tensor) -> Tensor:
        return (mode - self._shift) * self._scale

    def _raw(self, latent: Tensor) -> Tensor:
        return latent / self._scale + self._shift


def component_folder(path: str | Path, name: str) -> Path:
    """The folder of a model: path itself, or its subfolder `name` where path is a diffusers pipeline."""
    return Path(path) / name if (Path(path) / "model_index.json").is_file() else Path(path)
