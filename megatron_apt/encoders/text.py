"""Text encoders: captions to one embedding per token, and in some also to one vector for
the whole caption.

Those that run as a diffusers pipeline does are their families' (families/NAME/text.py).
"""

import abc
import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece
import tokenizers
import torch
from torch import Tensor

from megatron_apt.encoders.foreign_folder import (
    checked_model_folder,
    explained,
    load_frozen,
    read_object,
)
from megatron_apt.files import write_atomically
from megatron_apt.kernels.keyed_noise import derive_key, keyed_normal
from megatron_apt.schema import read_bytes

MAX_CAPTION_BYTES = 1 << 16  # the trainer drops longer sentences without a word
END = "</s>"


class TextEncoder(abc.ABC):
    """What every encoder has.

    Attributes:
        kind: by which it is stored.
        width: of the embeddings.
        pipelines: how the names of the pipelines begin whose encoder it is; "": of none.
        several_tokenizers: its pipelines have more than one.
    """

    kind: ClassVar[str] = ""
    pipelines: ClassVar[str] = ""
    several_tokenizers: ClassVar[bool] = False
    width: int

    @abc.abstractmethod
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """One (L_i, width) float32 CPU tensor per caption, L_i >= 1, as a model is to read it."""

    def encode_pooled(self, captions: Sequence[str]) -> tuple[list[Tensor], Tensor | None]:
        """encode(captions), and one (P,) float32 vector for each whole caption, or None
        where the encoder has none.
        """
        return self.encode(captions), None

    @abc.abstractmethod
    def config_dict(self) -> dict:
        """What load_text_encoder makes an equal encoder of."""


def train_sentencepiece(captions: Iterable[str], path: str | Path, vocab_size: int = 1024) -> None:
    """Trains a byte-pair model on captions and writes it to path, by rename.

    Byte-pair merging gives every frequent word a piece of its own, all words when the
    vocabulary has room; characters never seen become byte pieces, so that any prompt can
    be encoded. The file depends on the captions and vocab_size only.

    Args:
        vocab_size: upper limit. 256 byte pieces, 3 special ones and every character of
            the captions must fit.

    Raises:
        ValueError: no caption with text, a caption too long, or a vocabulary too small
            for the characters.
    """
    captions = [caption for caption in captions if caption.strip()]
    if not captions:
        raise ValueError("no caption has any text; sentencepiece needs at least one")
    longest = max(captions, key=lambda caption: len(caption.encode()))
    if len(longest.encode()) > MAX_CAPTION_BYTES:
        raise ValueError(
            f"caption {longest[:40]!r}... has {len(longest.encode())} bytes; shorten it to "
            f"{MAX_CAPTION_BYTES}"
        )
    needed = 256 + 3 + len(set("".join(captions))) + 1
    if vocab_size < needed:
        raise ValueError(
            f"vocab_size={vocab_size} does not hold the 256 byte pieces and the characters of these "
            f"captions; use at least {needed}"
        )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        max_sentence_length=MAX_CAPTION_BYTES,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=3,
    )
    write_atomically(path, model.getvalue())


class BuiltinTextEncoder(TextEncoder):
    """A fixed random embedding of sentencepiece pieces; no weights and no training.

    Each piece has its own N(0, 1) row, drawn from (seed, the piece's text). Keyed by
    text, not by id: two datasets with tokenizers of their own give the same word the same
    row, so a model may be trained on both. A sinusoidal position is added so that word
    order can be seen.

    Args:
        tokenizer: sentencepiece model file.
        width: width of the embedding.
        position_scale: amplitude of the position, small beside the rows' unit variance.
    """

    kind = "builtin"

    def __init__(self, tokenizer: str | Path, width: int = 64, seed: int = 0, position_scale: float = 0.1):
        if width < 2 or width % 2:
            raise ValueError(
                f"text width={width} must be even and at least 2: positions are sine and cosine pairs"
            )
        if not Path(tokenizer).is_file():
            raise FileNotFoundError(
                f"{tokenizer} does not exist; give a sentencepiece model file, or let `megatron-apt encode` "
                "train one"
            )
        self.tokenizer, self.width, self.seed, self.position_scale = (
            str(tokenizer),
            width,
            seed,
            position_scale,
        )
        self._pieces = read_pieces(Path(tokenizer))
        self._rows: dict[str, Tensor] = {}

    def config_dict(self) -> dict:
        return {
            "kind": self.kind,
            "tokenizer": self.tokenizer,
            "width": self.width,
            "seed": self.seed,
            "position_scale": self.position_scale,
        }

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """One (L, width) float32 tensor per caption; the empty caption is the single piece </s>."""
        embeddings = []
        for pieces in self._pieces.encode(list(captions), out_type=str):
            rows = torch.stack([self._row(piece) for piece in pieces or [END]])
            embeddings.append(rows + self.position_scale * self._positions(len(rows)))
        return embeddings

    def _row(self, piece: str) -> Tensor:
        if piece not in self._rows:
            key = derive_key(self.seed, "text embedding", piece)
            self._rows[piece] = keyed_normal(key, torch.zeros(1, dtype=torch.int64), self.width)[0]
        return self._rows[piece]

    def _positions(self, length: int) -> Tensor:
        rates = torch.exp(torch.arange(0, self.width, 2) * (-math.log(10000.0) / self.width))
        angles = torch.arange(length)[:, None] * rates
        return torch.cat((angles.sin(), angles.cos()), dim=1).float()


class HuggingFaceTextEncoder(TextEncoder):
    """T5EncoderModel or UMT5EncoderModel from a local folder, chosen by its config.json,
    with the tokenizer beside it.

    Captions are read as they are, without padding; WanTextEncoder does what a Wan
    pipeline does.

    Args:
        path: folder with config.json, *.safetensors and the tokenizer (spiece.model or
            tokenizer.json). Nothing is downloaded, no pickle is read.
        max_length: captions are cut to this many tokens, </s> included.
        dtype: "float32" or "bfloat16", of the model; embeddings are float32.
        tokenizer_path: folder of the tokenizer, if it is another.
    """

    kind = "huggingface"

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
        self._model = load_t5(Path(path), device, dtype)
        self.width = self._model.config.d_model
        self._tokenize = read_tokenizer(Path(tokenizer_path or path))
        for name in ("eos_token_id", "pad_token_id"):
            value, size = getattr(self._model.config, name), self._model.config.vocab_size
            if type(value) is not int or not 0 <= value < size:
                raise ValueError(
                    f"{path}/config.json: {name}={value!r}: must be one of the model's {size} tokens; "
                    "download it again"
                )

    def config_dict(self) -> dict:
        config = {
            "kind": self.kind,
            "path": self.path,
            "max_length": self.max_length,
            "dtype": self.dtype,
        }
        return config | ({"tokenizer_path": self.tokenizer_path} if self.tokenizer_path else {})

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """One (L, width) float32 CPU tensor per caption, padding dropped; the empty
        caption is the single token </s>.
        """
        if not captions:
            return []
        config = self._model.config
        ids = [[*self._tokenize(caption)[: self.max_length - 1], config.eos_token_id] for caption in captions]
        if (highest := max(max(row) for row in ids)) >= config.vocab_size:
            raise ValueError(
                f"{self.tokenizer_path or self.path}: gives token {highest}, and the model has "
                f"{config.vocab_size}; they do not belong together"
            )
        lengths = torch.tensor([len(row) for row in ids])
        padded = torch.full((len(ids), int(lengths.max())), config.pad_token_id)
        for row, values in zip(padded, ids, strict=True):
            row[: len(values)] = torch.tensor(values)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        device = self._model.device
        states = (
            self._model(input_ids=padded.to(device), attention_mask=mask.to(device))
            .last_hidden_state.float()
            .cpu()
        )
        return [state[:length] for state, length in zip(states, lengths.tolist(), strict=True)]


def load_t5(folder: Path, device: str, dtype: str) -> Any:
    """The frozen T5EncoderModel or UMT5EncoderModel of a folder.

    Raises:
        FileNotFoundError, ValueError: no such model, or none in safetensors.
    """
    import transformers  # seconds to import, and only this needs it

    model_type = read_model_type(folder)
    checked_model_folder(folder, model_type)
    model_class = {"t5": transformers.T5EncoderModel, "umt5": transformers.UMT5EncoderModel}[model_type]
    return load_frozen(model_class, folder, device, dtype=getattr(torch, dtype))


def read_tokenizer(folder: Path) -> Callable[[str], list[int]]:
    """A function from a caption to its ids, without </s>.

    Read with the tokenizer libraries themselves: what transformers makes of a folder with
    spiece.model alone depends on its version.

    Raises:
        FileNotFoundError: neither file in the folder.
    """
    if (folder / "spiece.model").is_file():
        return read_pieces(folder / "spiece.model").encode
    if (folder / "tokenizer.json").is_file():
        with explained(f"{folder}/tokenizer.json: is no tokenizer", remedy="copy it from the pipeline again"):
            data = read_bytes(folder / "tokenizer.json", remedy="copy it from the pipeline again")
            fast = tokenizers.Tokenizer.from_str(data.decode())
        return lambda caption: fast.encode(caption, add_special_tokens=False).ids
    raise FileNotFoundError(
        f"{folder}: neither spiece.model nor tokenizer.json; save the tokenizer there, or name its folder "
        "with text_tokenizer"
    )


def read_pieces(file: Path) -> sentencepiece.SentencePieceProcessor:
    """A sentencepiece model.

    Raises:
        ValueError: it is none, or one without pieces.
    """
    data = read_bytes(file, remedy="give a file written by sentencepiece")
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=data)
        if data and pieces.get_piece_size() > 1:
            return pieces
        reason = "no pieces"
    except RuntimeError as error:
        reason = str(error)
    raise ValueError(f"{file} is not a sentencepiece model ({reason}); give a file written by sentencepiece")


def read_model_type(path: str | Path) -> str:
    """ "t5" or "umt5", from the folder's config.json.

    Raises:
        FileNotFoundError, ValueError: no config.json, or one of another model.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; give a pipeline of a known family, a T5 or UMT5 encoder, or "
            "text='builtin'"
        )
    model_type = read_object(file).get("model_type")
    if model_type not in ("t5", "umt5"):
        raise ValueError(f"{file}: model_type={model_type!r}; only 't5' and 'umt5' are supported")
    return model_type
