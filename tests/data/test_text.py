"""Text encoders against their definitions and against transformers' own models."""

import json
import shutil

import pytest
import sentencepiece
import torch

from megatron_apt.encoders.load import load_text_encoder
from megatron_apt.encoders.text import BuiltinTextEncoder, HuggingFaceTextEncoder, train_sentencepiece

CAPTIONS = [
    f"a handwritten {digit} moving {way}"
    for digit in ("zero", "one", "two", "seven")
    for way in ("left", "right")
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tokenizer.model"
    train_sentencepiece(CAPTIONS * 20, path, 512)
    return path


def test_each_known_word_is_one_piece_and_unknown_ones_still_work(tokenizer):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    assert pieces.encode("a handwritten seven moving left", out_type=str) == [
        "▁a",
        "▁handwritten",
        "▁seven",
        "▁moving",
        "▁left",
    ]
    for text in ("a zebra", "日本 é", "zEro!"):
        ids = pieces.encode(text)
        assert pieces.unk_id() not in ids and pieces.decode(ids) == text


@pytest.mark.parametrize("captions", [["a"], ["one caption only"], ["é"], ["word " * 3000]])
def test_tiny_caption_sets(tmp_path, captions):
    train_sentencepiece(captions, tmp_path / "t.model", 512)
    encoder = BuiltinTextEncoder(tmp_path / "t.model", 8)
    assert [len(t) for t in encoder.encode([captions[0].strip()])] == [len(captions[0].split())]


def test_training_is_repeatable_and_names_its_problems(tokenizer, tmp_path):
    train_sentencepiece(CAPTIONS * 20, tmp_path / "again.model", 512)
    assert (tmp_path / "again.model").read_bytes() == tokenizer.read_bytes()
    with pytest.raises(ValueError, match="no caption"):
        train_sentencepiece(["", "  "], tmp_path / "t.model", 512)
    with pytest.raises(ValueError, match=r"vocab_size=100 .* at least 2"):
        train_sentencepiece(CAPTIONS, tmp_path / "t.model", 100)
    with pytest.raises(FileNotFoundError, match=r"no\.model"):
        BuiltinTextEncoder(tmp_path / "no.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"bad\.model is not"):
        BuiltinTextEncoder(tmp_path / "bad.model")


def test_rows_belong_to_words(tokenizer, tmp_path):
    width = 64
    encoder = BuiltinTextEncoder(tokenizer, width)
    seven_left, left_only, empty = encoder.encode(["a handwritten seven moving left", "left", ""])
    assert seven_left.shape == (5, width) and empty.shape == (1, width) and seven_left.dtype == torch.float32
    # Take the position off by its definition: sin and cos of k / 10000^(2 i / width), at amplitude 0.1.
    k, i = torch.arange(5.0)[:, None], torch.arange(width // 2)
    position = 0.1 * torch.cat(
        (torch.sin(k / 10000 ** (2 * i / width)), torch.cos(k / 10000 ** (2 * i / width))), 1
    )
    torch.testing.assert_close((seven_left - position)[4], (left_only - position[:1])[0], atol=1e-6, rtol=0)
    assert not torch.allclose(left_only, empty)
    # The same word has the same row under a tokenizer trained on other captions, and
    # another row under another seed.
    train_sentencepiece(["two steps to the left"], tmp_path / "other.model", 512)
    assert torch.equal(BuiltinTextEncoder(tmp_path / "other.model", width).encode(["left"])[0], left_only)
    assert not torch.allclose(BuiltinTextEncoder(tokenizer, width, seed=1).encode(["left"])[0], left_only)


def test_rows_are_unit_gaussian(tokenizer):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    encoder = BuiltinTextEncoder(tokenizer, 256, position_scale=0.0)
    rows = torch.stack([encoder._row(pieces.id_to_piece(i)) for i in range(pieces.vocab_size())])
    assert len(rows) > 256 and abs(rows.mean()) < 0.01 and abs(rows.std() - 1) < 0.01
    correlation = rows @ rows.T / 256 - torch.eye(len(rows)) * (rows**2).mean(1)
    assert correlation.abs().max() < 0.4  # 6 standard deviations


def test_builtin_config_survives_json(tokenizer):
    encoder = BuiltinTextEncoder(tokenizer, 32, seed=3)
    again = load_text_encoder(json.loads(json.dumps(encoder.config_dict())))
    assert torch.equal(again.encode(CAPTIONS[:1])[0], encoder.encode(CAPTIONS[:1])[0])
    with pytest.raises(ValueError, match="'clip' is unknown"):
        load_text_encoder({"kind": "clip"})
    with pytest.raises(ValueError, match="depth"):
        load_text_encoder({**encoder.config_dict(), "depth": 3})
    with pytest.raises(ValueError, match="width=7"):
        BuiltinTextEncoder(tokenizer, 7)


def save_t5(folder, tokenizer, kind):
    """A tiny random encoder and a sentencepiece tokenizer in one folder, as save_pretrained leaves them."""
    import transformers

    torch.manual_seed(0)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    sizes = dict(
        vocab_size=pieces.vocab_size(),
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    config, model = {
        "t5": (transformers.T5Config, transformers.T5EncoderModel),
        "umt5": (transformers.UMT5Config, transformers.UMT5EncoderModel),
    }[kind]
    model(config(**sizes, pad_token_id=0, eos_token_id=1)).save_pretrained(folder)
    shutil.copy(tokenizer, folder / "spiece.model")


@pytest.mark.parametrize("kind", ["t5", "umt5"])
def test_hugging_face_encoders(tokenizer, tmp_path, kind):
    import transformers

    save_t5(tmp_path, tokenizer, kind)
    encoder = load_text_encoder(json.loads(json.dumps(HuggingFaceTextEncoder(tmp_path).config_dict())))
    assert encoder.width == 16 and encoder.config_dict()["kind"] == "huggingface"
    captions = ["a handwritten seven moving left", "", "zero"]
    ours = encoder.encode(captions)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    model = (
        {"t5": transformers.T5EncoderModel, "umt5": transformers.UMT5EncoderModel}[kind]
        .from_pretrained(tmp_path)
        .eval()
    )
    assert type(encoder._model) is type(model)
    for caption, embedding in zip(captions, ours, strict=True):
        ids = [*pieces.encode(caption), pieces.eos_id()]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).last_hidden_state[0]  # alone, so without any padding
        torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=1e-4)
    (cut,) = HuggingFaceTextEncoder(tmp_path, max_length=3).encode(captions[:1])
    assert len(cut) == 3


def test_tokenizer_json_alone_is_enough(tokenizer, tmp_path):
    import tokenizers

    save_t5(tmp_path, tokenizer, "t5")
    with_pieces = HuggingFaceTextEncoder(tmp_path).encode(["one two"])[0]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.vocab_size())]
    fast = tokenizers.Tokenizer(
        tokenizers.models.Unigram(vocabulary, unk_id=pieces.unk_id(), byte_fallback=True)
    )
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", pieces.eos_id())]
    )
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "spiece.model").unlink()
    torch.testing.assert_close(HuggingFaceTextEncoder(tmp_path).encode(["one two"])[0], with_pieces)


def test_hugging_face_folder_problems(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        HuggingFaceTextEncoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="'clip'"):
        HuggingFaceTextEncoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        HuggingFaceTextEncoder(tmp_path)
    save_t5(tmp_path, tokenizer, "t5")
    (tmp_path / "spiece.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"spiece\.model"):
        HuggingFaceTextEncoder(tmp_path)
