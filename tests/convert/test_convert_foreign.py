"""Files that are no plain checkpoint of diffusers': read with what is around their names
taken off, or told what they are.
"""

import json
import shutil
import struct

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from megatron_apt.convert.counterparts import counterpart_of, counterpart_of_model
from megatron_apt.convert.errors import ConvertError
from megatron_apt.convert.exporter import Checkpoint, export_pipeline
from megatron_apt.convert.foreign import plain, what_it_is
from megatron_apt.convert.importer import import_checkpoint
from megatron_apt.convert.source import open_source
from megatron_apt.encoders.weight_files import WeightFileError, announced, printable, weight_files

SHAPE = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "ffn_dim": 37,
    "num_layers": 2,
}
FLUX = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 6, 6),
}


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """(folder with config.json, tensors) of a small Wan of random weights."""
    torch.manual_seed(1)
    model = WanTransformer3DModel(**SHAPE)
    folder = tmp_path_factory.mktemp("wan")
    model.save_pretrained(folder)
    return folder, {name: torch.randn_like(t).contiguous() for name, t in model.state_dict().items()}


def opened(tensors, config, file):
    save_file(tensors, file)
    return open_source(file, config=str(config / "config.json"))


PREFIXES = [
    "model.diffusion_model.",
    "diffusion_model.",
    "model.",
    "module.",
    "_orig_mod.",
    "transformer.",
    "net.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.module._orig_mod.",
    "my_pipeline.generator.",
    "state_dict.ema_model.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_stands_before_every_name_is_taken_off(wan, tmp_path, prefix):
    folder, tensors = wan
    source = opened(
        {prefix + name: tensor for name, tensor in tensors.items()}, folder, tmp_path / "x.safetensors"
    )
    assert source.entries.keys() == tensors.keys()
    assert source.notes == (f"names begin with {prefix}, which is taken off",)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


def test_prefixes_of_single_files_and_within_names_are_taken_off(mesh, wan, tmp_path):
    """Shards of which one has a prefix, and blocks that were compiled or wrapped one by
    one; the names that go out are diffusers'.
    """
    folder, tensors = wan
    names, target = sorted(tensors), tmp_path / "x"
    shutil.copytree(folder, target)
    (target / "diffusion_pytorch_model.safetensors").unlink()
    parts = [
        {"module." + name: tensors[name] for name in names[:10]},
        {
            name.replace("blocks.0.", "blocks.0._orig_mod.").replace(
                "blocks.1.", "blocks.1._fsdp_wrapped_module."
            ): tensors[name]
            for name in names[10:]
        },
    ]
    files = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for part, file in zip(parts, files, strict=True):
        save_file(part, target / file)
    places = {name: file for part, file in zip(parts, files, strict=True) for name in part}
    (target / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    source = open_source(target)
    run = import_checkpoint(source, counterpart_of(source.config, ""), tmp_path / "run", mesh)
    checkpoint = Checkpoint.open(str(run))
    export_pipeline(checkpoint, counterpart_of_model(checkpoint.model, ""), tmp_path / "out", mesh)
    out = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    assert out.keys() == tensors.keys() and all(
        torch.equal(out[name], tensor) for name, tensor in tensors.items()
    )


def test_other_parts_in_one_file_are_left_out_and_a_second_model_is_not(wan, tmp_path):
    folder, tensors = wan
    whole = {"model.diffusion_model." + name: tensor for name, tensor in tensors.items()}
    whole |= {
        name: torch.ones(1)
        for name in (
            "first_stage_model.decoder.proj_out.bias",
            "cond_stage_model.x",
            "text_encoders.t5xxl.shared.weight",
        )
    }
    source = opened(whole, folder, tmp_path / "x.safetensors")
    assert source.entries.keys() == tensors.keys()
    assert (
        "left out: cond_stage_model., first_stage_model., text_encoders. (other parts of a pipeline)"
        in source.notes
    )
    both = {
        prefix + name: tensor.clone() for prefix in ("ema.", "student.") for name, tensor in tensors.items()
    }
    with pytest.raises(
        ConvertError,
        match=r"has \S+ more than once, as ema\.\S+ and student\.\S+: "
        "a file of several models.*; keep the one you mean",
    ):
        opened(both, folder, tmp_path / "x.safetensors")


ADAPTERS = {
    "LoRA": (
        "transformer.blocks.0.attn1.to_q.lora_A.weight",
        "lora_unet_blocks_0_attn1_to_q.alpha",
        "transformer.a.to_q.lora.down.weight",
    ),
    "a LoRA (": (
        "unet.a.to_q_lora.down.weight",
        "base_model.model.blocks.0.to_q.lora_B.default.weight",
        "lora_te1_text_model.lora_up.weight",
    ),
    "LoHa": ("lora_unet_blocks_0_attn1_to_q.hada_w1_a",),
    "LoKr": ("lycoris_blocks_0_attn1_to_q.lokr_w1",),
    "DoRA": ("blocks.0.attn1.to_q.dora_scale", "blocks.0.attn1.to_q.lora_magnitude_vector.weight"),
    "OFT": ("lora_unet_blocks_0.oft_blocks",),
    "differences to a model": ("diffusion_model.blocks.0.self_attn.q.diff_b",),
    "quantised": (
        "blocks.0.attn1.to_q.weight_scale",
        "scaled_fp8",
        "blocks.0.ffn.net.0.proj.scale_weight",
        "a.weight.absmax",
    ),
    "quantised, by": (
        "a.weight.quant_state.bitsandbytes__nf4",
        "blocks.0.attn1.to_q.SCB",
        "blocks.0.qweight",
        "b.weight_scale_inv",
    ),
    "textual inversion": ("emb_params", "<my-cat>", "clip_l"),
    "ControlNet": ("controlnet_blocks.0.weight", "control_model.input_hint_block.0.weight"),
    "Wan VACE": ("vace_blocks.0.proj_out.weight", "model.diffusion_model.vace_patch_embedding.weight"),
    "IP-Adapter": ("ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"),
    "state of an optimiser": (
        "exp_avg.blocks.0.attn1.to_q.weight",
        "state.blocks.0.attn1.to_q.weight.exp_avg_sq",
    ),
    "T2I": ("adapter.body.0.in_conv.weight",),
    "a VAE": (
        "encoder.conv_in.weight",
        "first_stage_model.decoder.mid.block_1.norm1.weight",
        "decoder.upsamples.0.residual.0.gamma",
        "vae.quant_conv.weight",
    ),
    "text encoder (T5)": ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    "text encoder (CLIP)": (
        "text_model.encoder.layers.0.self_attn.k_proj.weight",
        "cond_stage_model.transformer.text_model.embeddings.x.weight",
    ),
    "image encoder (CLIP)": ("vision_model.embeddings.class_embedding",),
    "language model": ("model.layers.0.self_attn.q_proj.weight",),
    "UNet": ("model.diffusion_model.input_blocks.0.0.weight", "down_blocks.0.resnets.0.conv1.weight"),
    "LTX-Video": ("model.diffusion_model.patchify_proj.weight",),
    "(Wan: ": (
        "head.modulation",
        "model.diffusion_model.blocks.0.self_attn.q.weight",
        "model.time_embedding.0.weight",
        "generator.head.head.weight",
    ),
    "(Stable Diffusion 3: ": (
        "joint_blocks.0.x_block.attn.qkv.weight",
        "model.diffusion_model.joint_blocks.3.context_block.mlp.fc1.bias",
    ),
    "(HunyuanVideo: ": (
        "double_blocks.0.img_attn_qkv.weight",
        "model.model.txt_in.individual_token_refiner.blocks.0.norm1.weight",
        "module.img_in.proj.bias",
    ),
    "(FLUX: ": (
        "double_blocks.0.img_attn.qkv.weight",
        "model.diffusion_model.single_blocks.3.linear1.weight",
        "module.img_in.weight",
    ),
}


@pytest.mark.parametrize("what", ADAPTERS)
def test_what_a_file_is_instead_is_said_with_what_to_do(wan, tmp_path, what):
    folder, _ = wan
    for name in ADAPTERS[what]:
        with pytest.raises(ConvertError) as caught:
            opened({name: torch.ones(2, 3)}, folder, tmp_path / "x.safetensors")
        last = str(caught.value).split("; ")[-1]  # what it is, and the remedy
        assert what in last and name.split(".")[-1] in last and last.startswith("it "), (name, last)
        assert any(
            word in last
            for word in (
                "from_single_file",
                "save_pretrained",
                "give the transformer",
                "bf16, fp16 or fp32 weights",
            )
        ), last


def test_the_remedy_is_for_the_files_own_family(wan, tmp_path):
    """Not for that of a config.json that does not belong to it."""
    folder, _ = wan
    with pytest.raises(
        ConvertError,
        match=r"config\.json is of a WanTransformer3DModel: "
        r"`diffusers\.FluxTransformer2DModel\.from_single_file",
    ):
        opened({"double_blocks.0.img_attn.qkv.weight": torch.ones(1)}, folder, tmp_path / "x.safetensors")
    with pytest.raises(ConvertError, match="it is a LoRA"):  # without a config.json, too
        save_file({"a.lora_A.weight": torch.ones(1)}, tmp_path / "y.safetensors")
        open_source(tmp_path / "y.safetensors")


def test_diffusers_own_names_are_taken_for_nothing_else(wan):
    _, tensors = wan
    flux = FluxTransformer2DModel(**FLUX, joint_attention_dim=8, pooled_projection_dim=8).state_dict()
    for names, architecture in ((tensors, "WanTransformer3DModel"), (flux, "FluxTransformer2DModel")):
        assert what_it_is(names, architecture) is None
        found = plain(names, architecture)
        assert list(found.names) == list(names) and found.prefixes == found.beside == ()


def test_a_quantisation_that_config_json_tells_of_is_refused(wan, tmp_path):
    folder, _ = wan
    target = shutil.copytree(folder, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "bitsandbytes"}
    }
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConvertError, match=r"config\.json: has a quantization_config; take the bf16, fp16 or fp32 weights"
    ):
        open_source(target)


# Files that are no safetensors files, and headers that no writer makes


def header(tensors: dict, size: int, length: int | None = None) -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(size)


def one(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "a pointer of git-lfs"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page"),
        (b"\x80\x02}q\x00.", "a pickle"),
        (b"GGUF\x03\0\0\0" + bytes(30), "a GGUF file"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b'{"error": "Not found"}', "it is JSON"),
        (bytes(1000), "filled with zeros"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\0", "an archive"),
        (header({"a": one()}, 4)[:-1], "its tensors end at byte 4 of 3"),
        (header({"a": one()}, 5), "its tensors end at byte 4 of 5"),
        (header({"a": one()}, 4, length=2**63), "header would have 9223372036854775808 bytes"),
        (header({"a": one()}, 4, length=10**6), "header would have 1000000 bytes"),
        (
            header({"a": one(offsets=(0, 4)), "b": one(offsets=(0, 4))}, 4),
            "b lies in bytes .*, and the tensor before it ends at 4",
        ),
        (header({"a": one(), "b": one(offsets=(8, 12))}, 12), "b lies in bytes"),
        (header({"a": one(shape=(2**40, 2**40), offsets=(0, 4))}, 4), "a of shape"),
        (header({"a": one(shape=(2,))}, 4), "a of shape"),
        (header({"a": one(shape=(-1,))}, 4), "its header"),
        (header({"a": one(shape=[1] * 99)}, 4), "its header"),
        (header({"a": 3}, 4), "its header"),
        (header({"a": {"dtype": "F32"}}, 4), "its header"),
        (header(b'{"a":' + b"[" * 10**5, 4), "its header"),
        (header(b"{" + b" " * 100, 4), "its header"),
        (
            header(
                b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", '
                b'"shape": [1], "data_offsets": [4, 8]}}',
                8,
            ),
            "a lies in",
        ),
        (
            header({"a\x1b[31m\n" + "x" * 500: one(shape=(2,))}, 4),
            r"a\\x1b\[31m\\nx+\.\.\. \(507 characters\)",
        ),
    ],
)
def test_files_that_are_not_whole_are_named(wan, tmp_path, data, message):
    folder, _ = wan
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ConvertError, match=message) as caught:
        open_source(tmp_path / "x.safetensors", config=str(folder / "config.json"))
    assert (
        "x.safetensors: is no whole safetensors file (" in str(caught.value)
        and str(caught.value).isprintable()
    )


def test_a_dtype_that_is_no_weights_is_named(wan, tmp_path):
    folder, _ = wan
    for dtype, size in (("F8_E4M3", 1), ("I8", 1), ("U8", 1), ("I64", 8), ("F5_X\n", 3)):
        (tmp_path / "x.safetensors").write_bytes(header({"blocks.0.a": one(dtype, (1,), (0, size))}, size))
        with pytest.raises(
            ConvertError,
            match=rf"blocks\.0\.a has dtype {printable(dtype)[:4]}\S*; "
            "weights are F64, F32.*quantised ones must be expanded",
        ):
            open_source(tmp_path / "x.safetensors", config=str(folder / "config.json"))


def test_a_sparse_file_and_a_pipe_take_no_memory_and_no_time(tmp_path):
    import os

    with open(tmp_path / "x.safetensors", "wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(WeightFileError, match="filled with zeros"):
        announced(tmp_path / "x.safetensors")
    os.mkfifo(tmp_path / "y.safetensors")
    with pytest.raises(WeightFileError, match="is no regular file"):
        announced(tmp_path / "y.safetensors")


# Which files of a folder are taken


@pytest.mark.parametrize(
    ("names", "taken", "variant"),
    [
        (["diffusion_pytorch_model.fp16.safetensors"], ["diffusion_pytorch_model.fp16.safetensors"], "fp16"),
        (["model.fp16.safetensors", "model.safetensors"], ["model.safetensors"], ""),
        (["model.fp16.safetensors", "model.bf16.safetensors"], ["model.bf16.safetensors"], "bf16"),
        (
            ["model.non_ema.safetensors", "._model.safetensors", "pytorch_model.bin"],
            ["model.non_ema.safetensors"],
            "non_ema",
        ),
        (["wan2.1_t2v.safetensors"], ["wan2.1_t2v.safetensors"], "1_t2v"),
        (
            ["diffusion_pytorch_model.safetensors", "other.safetensors"],
            ["diffusion_pytorch_model.safetensors"],
            "",
        ),
    ],
)
def test_plain_names_come_before_variants(tmp_path, names, taken, variant):
    for name in names:
        save_file({"a": torch.ones(1)}, tmp_path / name)
    found = weight_files(tmp_path)
    assert [file.name for file in found.files] == taken and found.variant == variant


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        (
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "diffusion_pytorch_model-0000{}-of-00002.fp16.safetensors",
        ),
        (
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors",
        ),
        (
            "diffusion_pytorch_model.fp16.safetensors.index.json",
            "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors",
        ),
        ("model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002.safetensors"),
    ],
)
def test_shards_of_a_variant_are_found_by_its_index(tmp_path, index, shard):
    for i, name in ((1, "a"), (2, "b")):
        save_file({name: torch.full((3,), float(i))}, tmp_path / shard.format(i))
    with pytest.raises(WeightFileError, match=r"and no index \(\*\.safetensors\.index\.json\)"):
        weight_files(tmp_path)
    (tmp_path / index).write_text(
        json.dumps(
            {"metadata": {"total_size": 24}, "weight_map": {"a": shard.format(1), "b": shard.format(2)}}
        )
    )
    found = weight_files(tmp_path)
    assert [file.name for file in found.files] == [
        shard.format(1),
        shard.format(2),
    ] and found.variant == "fp16"
    plain_names = [
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
    ]
    assert list(found.plain("diffusion_pytorch_model").values()) == plain_names
    assert json.loads(found.plain_index("diffusion_pytorch_model"))["weight_map"] == dict(
        zip("ab", plain_names, strict=True)
    )


def test_folders_from_which_nothing_can_be_taken_say_why(tmp_path):
    def attempt(names, message):
        folder = tmp_path / "x"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in names:
            save_file({"a": torch.ones(1)}, folder / name)
        with pytest.raises(WeightFileError, match=message):
            weight_files(folder)

    attempt([], "no .safetensors file")
    attempt(
        ["pytorch_model.bin"],
        r"only pytorch_model\.bin, a pickle, which could run code: save it as safetensors first",
    )
    attempt(["model-q4.gguf"], r"only model-q4\.gguf, and weights are read from \.safetensors files")
    attempt(
        ["a.safetensors", "b.safetensors"],
        r"2 \.safetensors files of several names \(a\.safetensors, b\.safetensors\); give the one you mean",
    )
    attempt(["model.x.safetensors", "model.y.safetensors"], r"several variants of model \(x, y\); leave one")
