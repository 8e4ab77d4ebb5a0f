"""The text encoder of Wan pipelines: the numbers that their encode_prompt gives."""

import html
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_apt.encoders.pipelines import load_tokenizer, padded_tokens, read_index
from megatron_apt.encoders.text import TextEncoder, load_t5


def clean_prompt(text: str) -> str:
    """A prompt as Wan pipelines clean it (diffusers, pipeline_wan.prompt_clean): ftfy's
    repairs if that is installed, HTML entities, spaces.
    """
    import regex
    from diffusers.utils import is_ftfy_available

    if is_ftfy_available():
        import ftfy

        text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text)).strip()
    return regex.sub(r"\s+", " ", text).strip()


class WanTextEncoder(TextEncoder):
    """umT5 of a Wan pipeline folder: the rows of WanPipeline.encode_prompt without the
    zeros it pads with (data.text_length=512 adds those).

    Prompts are cleaned as the pipeline cleans them; ftfy takes part only if it is
    installed, as there.

    Args:
        path: pipeline folder with model_index.json, text_encoder/ and tokenizer/.
        max_length: tokens that captions are cut to, </s> included; also what they are
            padded to inside, which the last bits depend on.
        dtype: "float32" or "bfloat16", of the model; embeddings are float32.
        tokenizer_path: folder of the tokenizer, if it is not the pipeline's tokenizer/.
    """

    kind, pipelines = "wan", "Wan"

    def __init__(
        self,
        path: str | Path,
        max_length: int = 512,
        device: str = "cpu",
        dtype: str = "float32",
        tokenizer_path: str | Path = "",
    ):
        self.path, self.max_length, self.dtype, self.tokenizer_path = (
            str(path),
            max_length,
            dtype,
            str(tokenizer_path),
        )
        folder = Path(path)
        index = read_index(folder)
        self._tokenizer = load_tokenizer(index, "tokenizer", Path(tokenizer_path or folder / "tokenizer"))
        self._model = load_t5(folder / "text_encoder", device, dtype)
        self.width = self._model.config.d_model

    def config_dict(self) -> dict:
        config = {"kind": self.kind, "path": self.path, "max_length": self.max_length, "dtype": self.dtype}
        return config | ({"tokenizer_path": self.tokenizer_path} if self.tokenizer_path else {})

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """One (L, width) float32 CPU tensor per caption, of its real tokens; the empty
        caption is the single token </s>.
        """
        if not captions:
            return []
        tokens = padded_tokens(
            self._tokenizer, [clean_prompt(caption) for caption in captions], self.max_length, self._model
        )
        ids, mask = tokens.input_ids, tokens.attention_mask
        states = (
            self._model(ids.to(self._model.device), mask.to(self._model.device))
            .last_hidden_state.float()
            .cpu()
        )
        return [row[:length].clone() for row, length in zip(states, mask.sum(1).tolist(), strict=True)]


TEXT = WanTextEncoder
