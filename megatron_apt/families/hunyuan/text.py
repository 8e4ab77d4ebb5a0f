"""The text encoders of HunyuanVideo pipelines: the numbers that their encode_prompt gives."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_apt.encoders.pipelines import (
    CLIP_TOKENS,
    load_fast_tokenizer,
    load_model,
    load_tokenizer,
    padded_tokens,
    read_index,
)
from megatron_apt.encoders.text import TextEncoder


class HunyuanTextEncoder(TextEncoder):
    """Llama and CLIP of a HunyuanVideo pipeline folder:
    HunyuanVideoPipeline.encode_prompt with its default template.

    A caption is put into diffusers' prompt template. Its rows are what Llama's last two
    layers would read, without the template before it and without padding, which the
    transformer masks out of every attention. Its pooled vector is CLIP's, of the caption
    alone.

    Args:
        path: pipeline folder with model_index.json, text_encoder/, text_encoder_2/,
            tokenizer/ (tokenizer.json) and tokenizer_2/.
        max_length: tokens that captions with what follows them in the template are cut
            to.
        dtype: "float32" or "bfloat16", of the models; embeddings are float32.
    """

    kind, pipelines = "hunyuan", "HunyuanVideoPipeline"
    several_tokenizers = True

    def __init__(self, path: str | Path, max_length: int = 256, device: str = "cpu", dtype: str = "float32"):
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

        self.path, self.max_length, self.dtype = str(path), max_length, dtype
        folder = Path(path)
        index = read_index(folder)
        self._template = str(DEFAULT_PROMPT_TEMPLATE["template"])
        self._crop = int(DEFAULT_PROMPT_TEMPLATE["crop_start"])
        self._tokenizer = load_fast_tokenizer(folder / "tokenizer")
        self._check_tokenizer(folder / "tokenizer")
        self._clip_tokenizer = load_tokenizer(index, "tokenizer_2", folder / "tokenizer_2")
        self._clip = load_model(folder / "text_encoder_2", "CLIPTextModel", device, dtype)
        self._llama = _without_last_layers(
            load_model(folder / "text_encoder", "LlamaModel", device, dtype), 2
        )
        self.width = self._llama.config.hidden_size

    def _check_tokenizer(self, folder: Path) -> None:
        if self._tokenizer.padding_side != "right":
            raise ValueError(
                f"{folder}/tokenizer_config.json: padding_side={self._tokenizer.padding_side!r}, but "
                "HunyuanVideo's template is cut off at the start and padding at the end; set it to 'right'"
            )
        length = len(self._tokenizer(self._template.format("")).input_ids)
        if length <= self._crop:
            raise ValueError(
                f"{folder}/tokenizer.json: HunyuanVideo's prompt template is {length} tokens, of which "
                f"diffusers cuts off {self._crop}, so that nothing is left of an empty caption; give the "
                "tokenizer of the pipeline"
            )

    def config_dict(self) -> dict:
        return {"kind": self.kind, "path": self.path, "max_length": self.max_length, "dtype": self.dtype}

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """One (L, width) float32 CPU tensor per caption, of its tokens and <|eot_id|>;
        the empty caption is that token alone.
        """
        return self.encode_pooled(captions)[0]

    @torch.no_grad()
    def encode_pooled(self, captions: Sequence[str]) -> tuple[list[Tensor], Tensor | None]:
        """The rows of encode, and (n, P) pooled vectors; without captions there are neither."""
        if not captions:
            return [], None
        tokens = padded_tokens(
            self._tokenizer,
            [self._template.format(caption) for caption in captions],
            self._crop + self.max_length,
            self._llama,
        )
        ids, mask = tokens.input_ids, tokens.attention_mask
        states = (
            self._llama(ids.to(self._llama.device), mask.to(self._llama.device), use_cache=False)
            .last_hidden_state.float()
            .cpu()
        )
        rows = [
            row[real] for row, real in zip(states[:, self._crop :], mask[:, self._crop :].bool(), strict=True)
        ]
        ids = padded_tokens(self._clip_tokenizer, list(captions), CLIP_TOKENS, self._clip).input_ids
        return rows, self._clip(ids.to(self._clip.device)).pooler_output.float().cpu()


def _without_last_layers(llama: Any, skipped: int) -> Any:
    """A LlamaModel whose output is that of an earlier layer, not normalised. Asked for
    hidden states instead, it would keep those of all layers.
    """
    kept = len(llama.layers) - skipped
    llama.layers, llama.norm, llama.config.num_hidden_layers = llama.layers[:kept], torch.nn.Identity(), kept
    return llama


TEXT = HunyuanTextEncoder
