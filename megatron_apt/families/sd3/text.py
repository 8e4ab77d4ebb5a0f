"""The text encoders of Stable Diffusion 3 pipelines: the numbers that their encode_prompt gives."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_apt.encoders.foreign_folder import read_object
from megatron_apt.encoders.pipelines import (
    clip_length,
    load_model,
    load_tokenizer,
    padded_tokens,
    part_class,
    read_index,
)
from megatron_apt.encoders.text import TextEncoder, load_t5


class Sd3TextEncoder(TextEncoder):
    """Both CLIPs and the T5 of a Stable Diffusion 3 pipeline folder:
    StableDiffusion3Pipeline.encode_prompt.

    A caption is 77 rows, both CLIPs' joined along the width and padded with zeros to that
    of the T5, then max_length rows of the T5. Padding tokens are encoded like any other
    and kept, as models were trained. Its pooled vector is both CLIPs' projected text,
    joined.

    Args:
        path: pipeline folder with model_index.json, text_encoder/, text_encoder_2/,
            tokenizer/, tokenizer_2/, and text_encoder_3/ and tokenizer_3/ unless
            model_index.json has text_encoder_3 as [null, null]: the T5's rows are then
            zeros, as in the pipeline.
        max_length: tokens of the T5.
        dtype: "float32" or "bfloat16", of the models; embeddings are float32.
    """

    kind, pipelines = "sd3", "StableDiffusion3"
    several_tokenizers = True

    def __init__(self, path: str | Path, max_length: int = 256, device: str = "cpu", dtype: str = "float32"):
        self.path, self.max_length, self.dtype = str(path), max_length, dtype
        folder = Path(path)
        index = read_index(folder)
        self._clips = [
            load_model(folder / name, "CLIPTextModelWithProjection", device, dtype)
            for name in ("text_encoder", "text_encoder_2")
        ]
        self._tokenizers = [
            load_tokenizer(index, name, folder / name) for name in ("tokenizer", "tokenizer_2")
        ]
        smallest = min(self._clips, key=lambda clip: clip.config.max_position_embeddings)
        # The pipeline takes the first one's for both
        self._clip_length = clip_length(self._tokenizers[0], smallest, folder / "tokenizer")
        self._t5 = self._t5_tokenizer = None
        if not part_class(index, "text_encoder_3"):
            self.width = _joint_width(folder)
        else:
            if not (folder / "text_encoder_3").is_dir():
                raise FileNotFoundError(
                    f"{folder}/text_encoder_3 does not exist, but model_index.json names it; copy it there, "
                    "or set text_encoder_3 to [null, null] in model_index.json to encode without it (zeros "
                    "in its place)"
                )
            self._t5 = load_t5(folder / "text_encoder_3", device, dtype)
            self._t5_tokenizer = load_tokenizer(index, "tokenizer_3", folder / "tokenizer_3")
            self.width = self._t5.config.d_model
        joined = sum(clip.config.hidden_size for clip in self._clips)
        if joined > self.width:
            raise ValueError(
                f"{folder}: the two CLIPs are {joined} wide together, more than the {self.width} of the text "
                "that they are padded to"
            )

    def config_dict(self) -> dict:
        return {"kind": self.kind, "path": self.path, "max_length": self.max_length, "dtype": self.dtype}

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """One (77 + max_length, width) float32 CPU tensor per caption."""
        return self.encode_pooled(captions)[0]

    @torch.no_grad()
    def encode_pooled(self, captions: Sequence[str]) -> tuple[list[Tensor], Tensor | None]:
        """The rows of encode, and (n, P) pooled vectors; without captions there are neither."""
        if not captions:
            return [], None
        rows, pooled = zip(
            *(
                self._clip(clip, tokenizer, captions)
                for clip, tokenizer in zip(self._clips, self._tokenizers, strict=True)
            ),
            strict=True,
        )
        joined = torch.cat(rows, -1)
        joined = F.pad(joined, (0, self.width - joined.shape[-1]))
        return list(torch.cat((joined, self._t5_rows(captions)), 1)), torch.cat(pooled, -1)

    def _clip(self, clip: torch.nn.Module, tokenizer, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(n, 77, D) of the layer before the last, (n, D') pooled and projected."""
        ids = padded_tokens(tokenizer, list(captions), self._clip_length, clip).input_ids
        output = clip(ids.to(clip.device), output_hidden_states=True)
        return output.hidden_states[-2].float().cpu(), output.text_embeds.float().cpu()

    def _t5_rows(self, captions: Sequence[str]) -> Tensor:
        if self._t5 is None:
            return torch.zeros(len(captions), self.max_length, self.width)
        ids = padded_tokens(self._t5_tokenizer, list(captions), self.max_length, self._t5).input_ids
        # Without a mask, as in the pipeline
        return self._t5(ids.to(self._t5.device)).last_hidden_state.float().cpu()


def _joint_width(folder: Path) -> int:
    """Width of the text that the pipeline's transformer reads."""
    file = folder / "transformer" / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; without text_encoder_3 the width of the text is read from it, copy it "
            "there"
        )
    width = read_object(file).get("joint_attention_dim")
    if type(width) is not int or not 1 <= width <= 10**6:
        raise ValueError(
            f"{file}: joint_attention_dim={width!r}: must be the width of the text; download it again"
        )
    return width


TEXT = Sd3TextEncoder
