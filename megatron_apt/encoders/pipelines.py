"""Text encoders of whole diffusers pipelines: the numbers that a pipeline's own
encode_prompt gives, from its folder.

Models are read from safetensors and tokenizers from json or sentencepiece files in the
folder; nothing is downloaded and no pickle is read. Tokenizers are those of transformers,
by the class that model_index.json names, because a pipeline's are (but see
load_fast_tokenizer); batches are padded as a pipeline pads them, so that with its dtype
the embeddings are a pipeline's to the last bit.
"""

from pathlib import Path
from typing import Any

import torch

from megatron_apt.encoders.foreign_folder import (
    TOKENIZER_JSON,
    TOKENIZER_LINKS,
    checked_model_folder,
    explained,
    load_frozen,
    read_object,
    read_pretrained,
)
from megatron_apt.encoders.text import read_pieces

CLIP_TOKENS = 77


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


def load_model(folder: Path, class_name: str, device: str, dtype: str) -> Any:
    """The frozen model of a folder, of a class of transformers.

    Raises:
        FileNotFoundError, ValueError: no such model, or none in safetensors.
    """
    import transformers

    checked_model_folder(folder, class_name)
    return load_frozen(getattr(transformers, class_name), folder, device, dtype=getattr(torch, dtype))


def padded_tokens(tokenizer, captions: list[str], length: int, model: Any):
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


def clip_length(tokenizer, clip: Any, folder: Path) -> int:
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
