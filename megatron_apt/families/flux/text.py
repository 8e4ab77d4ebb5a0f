"""The text encoders of Flux pipelines: the numbers that their encode_prompt gives."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_apt.encoders.pipelines import clip_length, load_model, load_tokenizer, padded_tokens, read_index
from megatron_apt.encoders.text import TextEncoder, load_t5


class FluxTextEncoder(TextEncoder):
    """The T5 and the CLIP of a Flux pipeline folder: FluxPipeline.encode_prompt.

    A caption is the max_length rows of the T5, whose padding is encoded like any other
    token and kept, as models were trained. Its pooled vector is CLIP's.

    Args:
        path: pipeline folder with model_index.json, text_encoder/ and tokenizer/ (CLIP),
            text_encoder_2/ and tokenizer_2/ (T5).
        max_length: tokens of the T5; 512 for FLUX.1 dev, 256 for schnell.
        dtype: "float32" or "bfloat16", of the models; embeddings are float32.
    """

    kind, pipelines = "flux", "FluxPipeline"
    several_tokenizers = True

    def __init__(self, path: str | Path, max_length: int = 512, device: str = "cpu", dtype: str = "float32"):
        self.path, self.max_length, self.dtype = str(path), max_length, dtype
        folder = Path(path)
        index = read_index(folder)
        self._clip = load_model(folder / "text_encoder", "CLIPTextModel", device, dtype)
        self._clip_tokenizer = load_tokenizer(index, "tokenizer", folder / "tokenizer")
        self._clip_length = clip_length(self._clip_tokenizer, self._clip, folder / "tokenizer")
        self._t5 = load_t5(folder / "text_encoder_2", device, dtype)
        self._t5_tokenizer = load_tokenizer(index, "tokenizer_2", folder / "tokenizer_2")
        self.width = self._t5.config.d_model

    def config_dict(self) -> dict:
        return {"kind": self.kind, "path": self.path, "max_length": self.max_length, "dtype": self.dtype}

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """One (max_length, width) float32 CPU tensor per caption."""
        return self.encode_pooled(captions)[0]

    @torch.no_grad()
    def encode_pooled(self, captions: Sequence[str]) -> tuple[list[Tensor], Tensor | None]:
        """The rows of encode, and (n, P) pooled vectors; without captions there are neither."""
        if not captions:
            return [], None
        ids = padded_tokens(self._t5_tokenizer, list(captions), self.max_length, self._t5).input_ids
        # Without a mask, as in the pipeline
        rows = self._t5(ids.to(self._t5.device)).last_hidden_state.float().cpu()
        ids = padded_tokens(self._clip_tokenizer, list(captions), self._clip_length, self._clip).input_ids
        return list(rows), self._clip(ids.to(self._clip.device)).pooler_output.float().cpu()


TEXT = FluxTextEncoder
