"""Text encoders of whole diffusers pipelines: the numbers that a pipeline's own
encode_prompt gives, from its folder.

Models are read from safetensors and tokenizers from json or sentencepiece files in the
folder; nothing is downloaded and no pickle is read. Tokenizers are those of transformers,
by the class that model_index.json names, because a pipeline's are (but see
load_fast_tokenizer); batches are padded as a pipeline pads them, so that with its dtype
the embeddings are a pipeline's to the last bit.
"""

import html
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_apt.encoders.foreign_folder import (
    TOKENIZER_JSON,
    TOKENIZER_LINKS,
    checked_model_folder,
    explained,
    load_frozen,
    read_object,
    read_pretrained,
)
from megatron_apt.encoders.text import TextEncoder, load_t5, read_pieces

# By how the name of the pipeline's class begins; Flux's and HunyuanVideo's in full, since
# others of theirs encode text in other ways.
KINDS = {"Wan": "wan", "StableDiffusion3": "sd3", "FluxPipeline": "flux", "HunyuanVideoPipeline": "hunyuan"}
CLIP_TOKENS = 77


def pipeline_kind(folder: Path) -> str | None:
    """One of KINDS for a pipeline folder, None for one without model_index.json.

    Raises:
        ValueError: a pipeline of another kind.
    """
    if not (folder / "model_index.json").is_file():
        return None
    name = str(read_index(folder).get("_class_name") or "")
    for start, kind in KINDS.items():
        if name.startswith(start):
            return kind
    raise ValueError(
        f"{folder}/model_index.json: the text of {name or 'an unnamed pipeline'} cannot be encoded, only "
        f"that of pipelines whose class begins with {', '.join(KINDS)}; if its text encoder is a T5 or UMT5, "
        "give the folder of that"
    )


def read_index(folder: Path) -> dict:
    """model_index.json: the library and class of each component.

    Raises:
        FileNotFoundError: not a pipeline folder.
    """
    file = folder / "model_index.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give the local folder of a diffusers pipeline")
    return read_object(file)


def part_class(index: dict, name: str) -> str:
    """The class that model_index.json gives for a component; "" for none."""
    found = index.get(name)
    return found[1] if isinstance(found, list) and len(found) == 2 and isinstance(found[1], str) else ""


def class_of_transformers(index: dict, name: str) -> type | None:
    """The class of transformers that model_index.json gives for a component; None if it gives none."""
    import transformers

    library, found = index.get(name, [None])[0] if part_class(index, name) else None, part_class(index, name)
    if library != "transformers" or not found.isidentifier() or found.startswith("_"):
        return None
    found = getattr(transformers, found, None)
    return found if isinstance(found, type) else None


def load_tokenizer(index: dict, name: str, folder: Path):
    """The tokenizer of a folder, of the class that the pipeline's index gives for
    component `name`.

    Raises:
        FileNotFoundError, ValueError: no files, or a class that transformers does not
            have.
    """
    import transformers

    tokenizer_class = class_of_transformers(index, name)
    if tokenizer_class is None or not issubclass(tokenizer_class, transformers.PreTrainedTokenizerBase):
        raise ValueError(
            f"model_index.json: {name} is {index.get(name)}; it must name a tokenizer of transformers"
        )
    # Without its files transformers would make an empty vocabulary.
    sets = (("tokenizer.json",), ("spiece.model",), ("vocab.json", "merges.txt"))
    if not any(all((folder / file).is_file() for file in files) for files in sets):
        wanted = ", ".join(" and ".join(files) for files in sets)
        raise FileNotFoundError(f"{folder}: no tokenizer; it must hold one of {wanted}")
    return _read_tokenizer(tokenizer_class, folder)


def load_fast_tokenizer(folder: Path):
    """The tokenizer that a folder's tokenizer.json describes, whatever class the
    pipeline's index gives.

    HunyuanVideo's index names LlamaTokenizerFast, which since transformers 5 splits text
    as Llama 2 does: of a Llama 3 tokenizer.json it keeps the vocabulary alone, and spaces
    are lost without a word.

    Raises:
        FileNotFoundError: no tokenizer.json.
    """
    import transformers

    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder}/tokenizer.json does not exist; copy it from the pipeline")
    return _read_tokenizer(transformers.PreTrainedTokenizerFast, folder)


def _read_tokenizer(tokenizer_class: type, folder: Path):
    if not (folder / "tokenizer.json").is_file() and (folder / "spiece.model").is_file():
        read_pieces(folder / "spiece.model")  # of which transformers makes an empty vocabulary, if it is none
    tokenizer = read_pretrained(tokenizer_class, folder, TOKENIZER_LINKS, TOKENIZER_JSON, "tokenizer")
    tokenizer.name_or_path = str(folder)  # for messages
    if len(tokenizer.get_vocab().keys() - {str(token) for token in tokenizer.all_special_tokens}) < 2:
        raise ValueError(
            f"{folder}: the tokenizer cannot be read (it has no vocabulary); copy it from the pipeline again"
        )
    return tokenizer


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
        config = {"kind": "wan", "path": self.path, "max_length": self.max_length, "dtype": self.dtype}
        return config | ({"tokenizer_path": self.tokenizer_path} if self.tokenizer_path else {})

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """One (L, width) float32 CPU tensor per caption, of its real tokens; the empty
        caption is the single token </s>.
        """
        if not captions:
            return []
        tokens = _tokens(
            self._tokenizer, [clean_prompt(caption) for caption in captions], self.max_length, self._model
        )
        ids, mask = tokens.input_ids, tokens.attention_mask
        states = (
            self._model(ids.to(self._model.device), mask.to(self._model.device))
            .last_hidden_state.float()
            .cpu()
        )
        return [row[:length].clone() for row, length in zip(states, mask.sum(1).tolist(), strict=True)]


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
        self._clip_length = _length_of(self._tokenizers[0], smallest, folder / "tokenizer")
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
        return {"kind": "sd3", "path": self.path, "max_length": self.max_length, "dtype": self.dtype}

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
        ids = _tokens(tokenizer, list(captions), self._clip_length, clip).input_ids
        output = clip(ids.to(clip.device), output_hidden_states=True)
        return output.hidden_states[-2].float().cpu(), output.text_embeds.float().cpu()

    def _t5_rows(self, captions: Sequence[str]) -> Tensor:
        if self._t5 is None:
            return torch.zeros(len(captions), self.max_length, self.width)
        ids = _tokens(self._t5_tokenizer, list(captions), self.max_length, self._t5).input_ids
        # Without a mask, as in the pipeline
        return self._t5(ids.to(self._t5.device)).last_hidden_state.float().cpu()


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

    def __init__(self, path: str | Path, max_length: int = 512, device: str = "cpu", dtype: str = "float32"):
        self.path, self.max_length, self.dtype = str(path), max_length, dtype
        folder = Path(path)
        index = read_index(folder)
        self._clip = load_model(folder / "text_encoder", "CLIPTextModel", device, dtype)
        self._clip_tokenizer = load_tokenizer(index, "tokenizer", folder / "tokenizer")
        self._clip_length = _length_of(self._clip_tokenizer, self._clip, folder / "tokenizer")
        self._t5 = load_t5(folder / "text_encoder_2", device, dtype)
        self._t5_tokenizer = load_tokenizer(index, "tokenizer_2", folder / "tokenizer_2")
        self.width = self._t5.config.d_model

    def config_dict(self) -> dict:
        return {"kind": "flux", "path": self.path, "max_length": self.max_length, "dtype": self.dtype}

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """One (max_length, width) float32 CPU tensor per caption."""
        return self.encode_pooled(captions)[0]

    @torch.no_grad()
    def encode_pooled(self, captions: Sequence[str]) -> tuple[list[Tensor], Tensor | None]:
        """The rows of encode, and (n, P) pooled vectors; without captions there are neither."""
        if not captions:
            return [], None
        ids = _tokens(self._t5_tokenizer, list(captions), self.max_length, self._t5).input_ids
        # Without a mask, as in the pipeline
        rows = self._t5(ids.to(self._t5.device)).last_hidden_state.float().cpu()
        ids = _tokens(self._clip_tokenizer, list(captions), self._clip_length, self._clip).input_ids
        return list(rows), self._clip(ids.to(self._clip.device)).pooler_output.float().cpu()


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

    def __init__(self, path: str | Path, max_length: int = 256, device: str = "cpu", dtype: str = "float32"):
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

        self.path, self.max_length, self.dtype = str(path), max_length, dtype
        folder = Path(path)
        index = read_index(folder)
        self._template, self._crop = (
            DEFAULT_PROMPT_TEMPLATE["template"],
            DEFAULT_PROMPT_TEMPLATE["crop_start"],
        )
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
        return {"kind": "hunyuan", "path": self.path, "max_length": self.max_length, "dtype": self.dtype}

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
        tokens = _tokens(
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
        ids = _tokens(self._clip_tokenizer, list(captions), CLIP_TOKENS, self._clip).input_ids
        return rows, self._clip(ids.to(self._clip.device)).pooler_output.float().cpu()


def load_model(folder: Path, class_name: str, device: str, dtype: str) -> torch.nn.Module:
    """The frozen model of a folder, of a class of transformers.

    Raises:
        FileNotFoundError, ValueError: no such model, or none in safetensors.
    """
    import transformers

    checked_model_folder(folder, class_name)
    return load_frozen(getattr(transformers, class_name), folder, device, dtype=getattr(torch, dtype))


def _without_last_layers(llama: torch.nn.Module, skipped: int) -> torch.nn.Module:
    """A LlamaModel whose output is that of an earlier layer, not normalised. Asked for
    hidden states instead, it would keep those of all layers.
    """
    kept = len(llama.layers) - skipped
    llama.layers, llama.norm, llama.config.num_hidden_layers = llama.layers[:kept], torch.nn.Identity(), kept
    return llama


def _tokens(tokenizer, captions: list[str], length: int, model: torch.nn.Module):
    """Ids and mask of captions, padded to a length.

    Raises:
        ValueError: ids that the model does not have.
    """
    with explained(
        f"{tokenizer.name_or_path}: the tokenizer cannot encode captions",
        remedy="copy it from the pipeline again",
    ):
        tokens = tokenizer(
            captions,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
    if int(tokens.input_ids.max()) >= model.config.vocab_size or int(tokens.input_ids.min()) < 0:
        raise ValueError(
            f"{tokenizer.name_or_path}: gives tokens up to {int(tokens.input_ids.max())}, and its "
            f"{type(model).__name__} has {model.config.vocab_size}; tokenizer and text encoder are of "
            "different pipelines"
        )
    return tokens


def _length_of(tokenizer, clip: torch.nn.Module, folder: Path) -> int:
    """How many tokens CLIP is given.

    Raises:
        ValueError: more than it has positions for, or no number.
    """
    length, positions = tokenizer.model_max_length, clip.config.max_position_embeddings
    if type(length) is not int or not 2 <= length <= positions:
        raise ValueError(
            f"{folder}/tokenizer_config.json: model_max_length={length}, but the CLIP models have "
            f"{positions} positions; set it to that"
        )
    return length


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
