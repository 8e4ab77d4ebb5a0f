"""Settings of `megatron-apt encode`, which say themselves what does not fit."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_apt.encode.policy import PixelPolicy
from megatron_apt.encoders.load import vae_codecs
from megatron_apt.errors import require
from megatron_apt.families import registry

NEGATIVE_PROMPT = "blurry, distorted, low quality"


@dataclass(frozen=True)
class EncodeConfig:
    """Settings of `megatron-apt encode`."""

    source: str
    """Folder of pictures or videos, or a manifest (.jsonl or .csv) with columns path,
    caption and optionally start, fps.
    """
    output: str
    """Folder of the dataset. An interrupted encoding with the same settings continues there."""
    height: int = 256
    """Height of the bucket, in pixels."""
    width: int = 256
    """Width of the bucket, in pixels."""
    frames: int = 1
    """Frames of the bucket. With 1, pictures are accepted and videos give their first frame."""
    fps: float = 0.0
    """Frames per second to sample videos at; 0 keeps the source's frames and applies stride."""
    stride: int = 1
    """Take every stride-th frame, if fps is 0."""
    start: float = 0.0
    """Seconds to skip at the beginning of each video."""
    allow_upscale: bool = False
    """Accept pictures and videos smaller than the bucket."""
    hdr: Literal["tonemap", "reject", "warn"] = "tonemap"
    """HDR pictures and videos (PQ, HLG): tone-mapped to BT.709, rejected, or taken as
    they are with a note.
    """
    interlaced: Literal["deinterlace", "reject", "warn"] = "deinterlace"
    """Interlaced videos: deinterlaced, rejected, or left combed with a note."""
    background: str = "white"
    """What lies under transparent pixels: a colour's name, or #rrggbb."""
    most_pixels: int = 1 << 27
    """Largest picture that is decoded, in pixels (height x width), and four times the
    largest frame of a video; what is larger is rejected.
    """
    codec: str = "pixel"
    """"pixel" (built in, no weights), or the class of codec_path: "kl" (AutoencoderKL, of
    pictures), or that of a family: "wan" (AutoencoderKLWan), "hunyuan"
    (AutoencoderKLHunyuanVideo).
    """
    codec_path: str = ""
    """Local folder of the VAE, or of a diffusers pipeline with the VAE in vae/; safetensors only."""
    codec_tiling: int = 0
    """VAEs: side in pixels of the tiles that are encoded one after the other, which saves
    memory but changes latents a little; 0: whole.
    """
    pixel_channels: int = 3
    """Pixel codec: 3 for RGB, 1 for luma."""
    pixel_temporal: int = 4
    """Pixel codec: frames of one latent frame."""
    pixel_causal: bool = True
    """Pixel codec: the first frame stands alone (1 + k * temporal frames), as in video
    VAEs; off: whole groups only (k * temporal frames).
    """
    pixel_spatial: int = 1
    """Pixel codec: side of the pixel block of one latent position."""
    pixel_shift: float = 0.0
    """Pixel codec: mean pixel value of the data, in [-1, 1]."""
    pixel_scale: float = 1.0
    """Pixel codec: latents are divided by it."""
    text: str = "builtin"
    """"builtin" (needs no weights), or a local folder: a diffusers pipeline (Wan,
    HunyuanVideo, Stable Diffusion 3, Flux), for embeddings as its encode_prompt gives
    them; or a T5 or UMT5 encoder with its tokenizer.
    """
    text_tokenizer: str = ""
    """Folder of the tokenizer, if it is not in the Wan pipeline's tokenizer/ or beside
    the T5 or UMT5 encoder.
    """
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which text encoders of a folder run. Embeddings are kept in float32."""
    image_to_video: bool = False
    """Keep of each clip also what image-to-video models are given of its first frame
    (codec 'wan'): mask, latents, and the tokens of the image encoder where there is one.
    Wan2.2's TI2V needs none of it: it reads the first frame of the clip's own latents.
    """
    image_encoder: str = ""
    """Local folder of a pipeline with image_encoder/ and image_processor/ (Wan2.1 I2V;
    Wan2.2 has none); empty: the one given as text, if it has them.
    """
    tokenizer: str = ""
    """Built-in text encoder: an existing sentencepiece model; empty trains one on the captions."""
    text_width: int = 64
    """Built-in text encoder: width of the embeddings."""
    vocab_size: int = 1024
    """Built-in text encoder: largest vocabulary to train."""
    negative_prompt: str = NEGATIVE_PROMPT
    """The fixed negative prompt that consistency distillation folds into its guidance."""
    samples_per_shard: int = 1000
    """Inputs per tar file."""
    max_rejected: float = 0.1
    """Stop when more than this share of the inputs is unusable."""
    device: str = "cpu"
    """"cpu" or "cuda": where codec and text encoder run. Decoding follows it."""

    def __post_init__(self):
        for field in ("height", "width", "frames", "stride", "samples_per_shard"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "must be at least 1")
        for field in ("fps", "start"):
            value = getattr(self, field)
            require(math.isfinite(value) and value >= 0, field, value, "must be a number >= 0")
        share = self.max_rejected
        require(0 <= share <= 1, "max_rejected", share, "is a share; use a number from 0 to 1")
        require(self.device in ("cpu", "cuda"), "device", self.device, "use 'cpu' or 'cuda'")
        self.policy()
        self._check_codec()
        self._check_first_frames()
        if self.text == "builtin" and self.text_tokenizer:
            self._refuse("text_tokenizer", "text='builtin' has its own: use tokenizer")
        if self.fps and self.stride != 1:
            self._refuse("stride", f"applies only with fps=0, but fps={self.fps:g}; leave one of them out")

    def policy(self) -> PixelPolicy:
        """What is done with pictures that can become samples in more than one way.

        Raises:
            ValueError: naming the setting.
        """
        return PixelPolicy(self.hdr, self.interlaced, self.background, self.most_pixels)

    def _refuse(self, field: str, remedy: str) -> None:
        require(False, field, getattr(self, field), remedy)

    def _check_codec(self) -> None:
        known = ("pixel", *vae_codecs())
        if self.codec not in known:
            self._refuse("codec", f"use {', '.join(map(repr, known))}")
        if self.codec != "pixel" and not self.codec_path:
            self._refuse("codec_path", f"codec={self.codec!r} needs a local folder")
        if self.codec == "pixel" and self.codec_tiling:
            self._refuse("codec_tiling", "applies to VAEs; leave it 0 with codec='pixel'")

    def _check_first_frames(self) -> None:
        giving = registry.codecs_of(kind for kind in registry.FAMILIES.values() if kind.given_channels)
        if self.image_to_video and self.codec not in giving:
            self._refuse(
                "image_to_video", f"needs codec={' or '.join(map(repr, giving))}, not {self.codec!r}"
            )
        if self.image_to_video and self.frames == 1:
            self._refuse("frames", "with image_to_video the first is given; encode clips of several")
        if self.image_encoder and not self.image_to_video:
            self._refuse("image_encoder", "applies with image_to_video; turn that on")
