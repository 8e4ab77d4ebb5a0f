"""Folders of pipelines that are damaged, of another kind or hostile: nothing of them
runs, nothing large is made, and the message names file and field.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_apt.encoders.codec import KlCodec
from megatron_apt.encoders.image import ClipImageEncoder, load_image_encoder
from megatron_apt.encoders.load import load_codec, load_text_encoder, open_text_encoder
from megatron_apt.encoders.text import HuggingFaceTextEncoder
from megatron_apt.families.wan.codec import WanCodec
from support.pipelines import change_json, kl_vae, save_wan, save_wan_i2v, sentencepiece_folder, t5

CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return save_wan(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    return save_wan_i2v(tmp_path_factory.mktemp("hub"), with_clip=True)


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "vae"
    kl_vae().save_pretrained(folder)
    return folder


def refused(pipeline, tmp_path, file, fields, load, message):
    folder = shutil.copytree(pipeline, tmp_path / "x")
    change_json(folder / file, **fields)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    # The user's folder, not the one that libraries see
    assert str(folder) in str(caught.value) and "megatron-apt-" not in str(caught.value)


def encoded(folder):
    return open_text_encoder(folder).encode(["two steps", ""])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 10**9}, "num_layers=1000000000, and the files hold 22 tensors"),
        ({"num_layers": -1}, "num_layers=-1: must be at least 1"),
        (
            {"num_layers": 1},
            r"asks for fewer layers than there are: the weights have encoder\.block\.1\.\S+ too",
        ),
        ({"num_layers": "2"}, "Field 'num_layers' expected int"),
        ({"d_model": 10**12}, r"asks for \d+ numbers, and the files hold 7648"),
        ({"vocab_size": 10**15}, r"asks for \d+ numbers"),
        ({"num_heads": 10**9}, "num_heads=1000000000"),
        ({"num_labels": 10**9}, "num_labels=1000000000"),
        ({"relative_attention_num_buckets": 10**12}, "relative_attention_num_buckets=1000000000000"),
        ({"nested": {"num_hidden_layers": 10**10}}, r"nested\.num_hidden_layers=10000000000"),
        ({"extra": json.loads("[" * 900 + "]" * 900)}, r"config\.json: nested too deeply"),
        ({"id2label": 5}, r"UMT5EncoderModel cannot be read \(AttributeError"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quantization_config; take weights in bf16",
        ),
    ],
)
def test_text_encoders_that_the_files_do_not_hold_are_not_begun(wan, tmp_path, fields, message):
    refused(wan, tmp_path, "text_encoder/config.json", fields, encoded, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_dim": 10**12}, "AutoencoderKLWan cannot be read"),
        ({"num_res_blocks": 10**9}, "num_res_blocks=1000000000, and the files hold"),
        ({"dim_mult": [1] * 10**5}, r"dim_mult=\[1, 1, .*\.\.\. \(300000 characters\), and the files"),
        ({"in_channels": 10**9}, r"asks for \d+ numbers"),
        ({"z_dim": "4"}, "AutoencoderKLWan cannot be read"),
        ({"latents_mean": ["a"] * 4}, r"vae/config\.json: latents_mean\[0\]: Expected float, got str"),
        ({"latents_mean": None}, "latents_mean: Expected array, got null"),
        ({"latents_std": [1.0]}, "latents_std has 1 numbers, z_dim=4"),
        ({"latents_std": [1.0, 0.0, 1.0, 1.0]}, "latents_std=.*: must be above 0"),
        ({"latents_std": [1.0, float("nan"), 1.0, 1.0]}, "latents_std=.*: must be above 0"),
        ({"patch_size": 10**9}, "patch_size: Expected int <= 256"),
    ],
)
def test_vaes_that_cannot_be_are_named(wan, tmp_path, fields, message):
    refused(wan, tmp_path, "vae/config.json", fields, WanCodec, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scaling_factor": "x"}, "scaling_factor: Expected float, got str"),
        ({"scaling_factor": 0}, "scaling_factor=0.0: must be above 0"),
        ({"shift_factor": float("inf")}, "shift_factor=inf: must be finite"),
        (
            {"down_block_types": ["os.system"] * 3},
            r"AutoencoderKL cannot be read \(ValueError: os\.system does not exist",
        ),
        ({"layers_per_block": 10**9}, "layers_per_block=1000000000"),
    ],
)
def test_vaes_of_pictures_that_cannot_be_are_named(kl, tmp_path, fields, message):
    refused(kl, tmp_path, "config.json", fields, KlCodec, message)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        (
            "image_processor/preprocessor_config.json",
            {"size": {"shortest_edge": 10**9}},
            "size=.*: must be at most 4096 pixels",
        ),
        (
            "image_processor/preprocessor_config.json",
            {"crop_size": {"height": 16, "width": 16}},
            r"makes pictures of \(1, 3, 16, 16\), .* 3 x 32 x 32",
        ),
        ("image_processor/preprocessor_config.json", {"image_std": [0, 0, 0]}, "reads finite ones"),
        ("image_processor/preprocessor_config.json", {"image_mean": ["a"] * 3}, "cannot prepare a picture"),
        ("image_processor/preprocessor_config.json", {"rescale_factor": "x"}, "cannot prepare a picture"),
        ("image_encoder/config.json", {"image_size": 10**9}, "CLIPVisionModel cannot be read"),
        ("image_encoder/config.json", {"patch_size": 0}, "CLIPVisionModel cannot be read"),
    ],
)
def test_image_encoders_that_cannot_be_are_named(i2v, tmp_path, file, fields, message):
    refused(
        i2v,
        tmp_path,
        file,
        fields,
        lambda folder: ClipImageEncoder(folder).encode(torch.zeros(3, 1, 40, 40)),
        message,
    )


def test_what_a_folder_would_run_fetch_or_open_is_not_looked_at(wan, tmp_path):
    """Code beside the weights, adapters, kernels of a hub, templates, paths: the
    embeddings are those of the folder without them.
    """
    folder = shutil.copytree(wan, tmp_path / "x")
    before = encoded(folder)
    change_json(
        folder / "text_encoder/config.json",
        auto_map={"AutoModel": "evil.Model"},
        attn_implementation="someone/kernel",
        _attn_implementation="someone/kernel",
        trust_remote_code=True,
    )
    (folder / "text_encoder/adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "someone/base"}'
    )
    (folder / "text_encoder/pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    change_json(
        folder / "tokenizer/tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
        tokenizer_class="Evil",
        tokenizer_file="/etc/passwd",
        vocab_file="/etc/passwd",
        chat_template="{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        model_max_length="x",
    )
    for place in ("text_encoder", "tokenizer", "."):
        (folder / place / "evil.py").write_text(CODE)
    after = encoded(folder)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not list(folder.rglob("ran"))


@pytest.mark.parametrize(
    "named",
    [
        ["os", "system"],
        ["evil", "Tokenizer"],
        ["transformers", "pipeline"],
        ["transformers", "__class__"],
        ["transformers", "AutoModel"],
        "x",
        [3, 4],
    ],
)
def test_only_tokenizers_of_transformers_are_loaded(wan, tmp_path, named):
    folder = shutil.copytree(wan, tmp_path / "x")
    change_json(folder / "model_index.json", tokenizer=named)
    with pytest.raises(
        ValueError, match=r"model_index\.json: tokenizer is .*; it must name a tokenizer of transformers"
    ):
        open_text_encoder(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "{}",
        "[]",
        "[" * 10**5,
        '{"version": "1.0", "added_tokens": [{"id": -1}], "model": {"type": "BPE"}}',
    ],
)
def test_tokenizers_that_cannot_be_read_are_named(wan, tmp_path, text):
    folder = shutil.copytree(wan, tmp_path / "x")
    (folder / "tokenizer/tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"x/tokenizer: the tokenizer cannot be read"):
        open_text_encoder(folder)


def test_pieces_that_are_none_are_not_an_empty_vocabulary(wan, tmp_path):
    folder = shutil.copytree(wan, tmp_path / "x")
    (folder / "tokenizer/tokenizer.json").unlink()
    whole = (sentencepiece_folder(tmp_path) / "spiece.model").read_bytes()
    for data in (b"", b"x" * 100, bytes(1000), whole[: len(whole) // 2]):
        (folder / "tokenizer/spiece.model").write_bytes(data)
        with pytest.raises(ValueError, match=r"tokenizer/spiece\.model is not a sentencepiece model"):
            open_text_encoder(folder)


def test_tokens_that_the_model_does_not_have_are_named(tmp_path):
    """Of another pipeline's tokenizer; torch would speak of an index."""
    pieces = sentencepiece_folder(tmp_path / "pieces")
    folder = tmp_path / "t5"
    t5("t5", range(20), 16).save_pretrained(folder)
    shutil.copy(pieces / "spiece.model", folder)
    with pytest.raises(
        ValueError, match=r"t5: gives token \d\d, and the model has 20; they do not belong together"
    ):
        HuggingFaceTextEncoder(folder).encode(["the quick brown fox runs over the snow & <b>"])
    change_json(folder / "config.json", eos_token_id=None)
    with pytest.raises(
        ValueError, match=r"t5/config\.json: eos_token_id=None: must be one of the model's 20 tokens"
    ):
        HuggingFaceTextEncoder(folder)


def test_quantised_weights_and_adapters_are_no_encoders(kl, tmp_path):
    for name, tensor, message in (
        ("extra", torch.ones(2, dtype=torch.int8), r"extra has dtype I8: the weights are quantised"),
        (
            "extra",
            torch.ones(2).to(torch.float8_e4m3fn),
            r"extra has dtype F8_E4M3: the weights are quantised",
        ),
        ("encoder.conv_in.weight_scale", torch.ones(1), r"cannot be read as it is; it is quantised"),
        ("encoder.conv_in.lora_A.weight", torch.ones(1), r"cannot be read as it is; it is a LoRA"),
    ):
        folder = shutil.copytree(kl, tmp_path / "x")
        file = folder / "diffusion_pytorch_model.safetensors"
        save_file(load_file(file) | {name: tensor}, file)
        with pytest.raises(ValueError, match=message):
            KlCodec(folder)
        shutil.rmtree(folder)


def test_a_variant_in_shards_gives_the_same_latents(kl, tmp_path):
    """Names as diffusers wrote them early and late; a pickle beside them changes nothing."""
    pixels = torch.rand(3, 1, 16, 16) * 2 - 1
    want = KlCodec(kl).encode(pixels)
    held = load_file(kl / "diffusion_pytorch_model.safetensors")
    names = sorted(held)
    for shard in (
        "diffusion_pytorch_model-0000{}-of-00002.fp16.safetensors",
        "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors",
    ):
        folder = tmp_path / shard[:26].replace("{", "_")
        folder.mkdir()
        shutil.copy(kl / "config.json", folder)
        places = {name: shard.format(1 + (i % 2)) for i, name in enumerate(names)}
        for file in set(places.values()):
            save_file(
                {name: held[name] for name in names if places[name] == file},
                folder / file,
                metadata={"format": "pt"},
            )
        (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(
            json.dumps({"metadata": {}, "weight_map": places})
        )
        (folder / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
        assert torch.equal(KlCodec(folder).encode(pixels), want)


@pytest.mark.parametrize(
    ("load", "config", "message"),
    [
        (load_codec, {"kind": "pixel", "temporal": 10**9}, r"codec pixel: temporal: Expected int <= 256"),
        (load_codec, {"kind": "pixel", "spatial": "x"}, r"codec pixel: spatial: Expected int, got str"),
        (load_codec, {"kind": "wan", "path": 5}, r"codec wan: path: Expected str, got int"),
        (
            load_codec,
            {"kind": "wan", "path": "x", "dtype": "load"},
            r"codec wan: dtype: Invalid enum value 'load'",
        ),
        (load_codec, {"kind": ["wan"]}, r"codec kind=\['wan'\] is unknown"),
        (
            load_text_encoder,
            {"kind": "wan", "path": "x", "max_length": 10**12},
            r"text encoder wan: max_length: Expected int <= 65536",
        ),
        (
            load_text_encoder,
            {"kind": "builtin", "tokenizer": "x", "width": 10**12},
            r"text encoder builtin: width: Expected int <= 65536",
        ),
        (load_text_encoder, {"kind": {}}, r"text encoder kind=\{\} is unknown"),
        (load_image_encoder, {"kind": "clip"}, r"image encoder clip: has no path"),
        (
            load_image_encoder,
            {"kind": "clip", "path": None},
            r"image encoder clip: path: Expected str, got null",
        ),
    ],
)
def test_settings_of_a_dataset_that_cannot_be_are_named(load, config, message):
    with pytest.raises(ValueError, match=message):
        load(config)
