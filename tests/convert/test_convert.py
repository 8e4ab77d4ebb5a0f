"""Hugging Face checkpoints in and out: files, refusals, interruption, and the pipelines
that load what we write.
"""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import tyro
import yaml
from diffusers import WanTransformer3DModel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.serialization import load_tensors_metadata
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from megatron_apt.checkpoint import store, sums
from megatron_apt.cli import main
from megatron_apt.convert import importer
from megatron_apt.convert.command import Command, Verify, perform
from megatron_apt.convert.counterparts import counterpart_of, counterpart_of_model
from megatron_apt.convert.errors import ConvertError
from megatron_apt.convert.exporter import Checkpoint, export_pipeline
from megatron_apt.convert.importer import import_checkpoint
from megatron_apt.convert.source import open_source
from megatron_apt.convert.weights import (
    ByHead,
    ChannelsFirst,
    ColumnsByHead,
    Reordered,
    Rule,
    Stacked,
    View,
    mapped,
)
from megatron_apt.families.mmdit.config import MMDiTConfig
from megatron_apt.lock import FolderInUse, FolderLock

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHAPE = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "ffn_dim": 37,
    "num_layers": 2,
}


@pytest.fixture
def wan(tmp_path):
    """A folder with a small sharded Wan of random weights, some of them bf16."""
    torch.manual_seed(1)
    model = WanTransformer3DModel(**SHAPE)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.2)
        if "attn" in name:
            p.data = p.data.bfloat16()
    model.save_pretrained(tmp_path / "wan", max_shard_size="60KB")
    return tmp_path / "wan"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def imported(source: Path, target: Path, mesh, **options) -> Path:
    opened = open_source(source)
    return import_checkpoint(opened, counterpart_of(opened.config, str(source)), target, mesh, **options)


def exported(checkpoint: Path, target: Path, mesh, **options) -> Path:
    opened = Checkpoint.open(str(checkpoint))
    export_pipeline(opened, counterpart_of_model(opened.model, ""), target, mesh, **options)
    return target


@pytest.mark.parametrize(
    ("change", "shapes"),
    [
        (ByHead(3, (4, 4)), [(12, 5), (12, 5)]),
        (ByHead(3, (4, 4, 7)), [(12,), (12,), (21,)]),
        (ColumnsByHead(3, (2, 5)), [(4, 21)]),
        (Stacked(2), [(7,), (7,)]),
        (View((6, -1), (6, 2, 1, 3, 3)), [(6, 2, 1, 3, 3)]),
        (Reordered((1, 0)), [(8, 3)]),
        (Reordered((2, 0, 1)), [(9,)]),
        (ChannelsFirst((1, 2, 2)), [(12, 5)]),
    ],
)
def test_changes_undo_each_other(change, shapes):
    parts = [torch.randn(shape) for shape in shapes]
    back = change.theirs(change.ours(parts))
    assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True))
    empty = change.theirs(torch.empty(change.ours(parts).shape, device="meta"))
    assert [tuple(t.shape) for t in empty] == shapes


def test_a_tensor_of_ours_without_a_rule_is_named():
    with pytest.raises(ValueError, match=r"0 rules for our tensor 'b\.weight'"):
        mapped([Rule("a.weight", ("x",))], {"a.weight": torch.Size((1,)), "b.weight": torch.Size((1,))})


@pytest.mark.parametrize("part_bytes", [1, 2**16, 2**30])
def test_import_and_export_keep_every_bit(mesh, wan, tmp_path, part_bytes):
    folder = imported(wan, tmp_path / "run", mesh, part_bytes=part_bytes)
    assert store.damages(folder) == []
    out = exported(folder, tmp_path / "out", mesh, shard_bytes=50_000)
    before, after = tensors(wan), tensors(out / "transformer")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    assert json.loads((out / "transformer/config.json").read_text()) == json.loads(
        (wan / "config.json").read_text()
    )
    index = json.loads((out / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in before.values())
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_a_file_and_a_pipelines_folder_are_sources_too(mesh, wan, tmp_path):
    save_file(tensors(wan), tmp_path / "one.safetensors")
    with pytest.raises(ConvertError, match=r"config\.json does not exist.*--config"):
        open_source(tmp_path / "one.safetensors")
    one = open_source(tmp_path / "one.safetensors", config=str(wan / "config.json"))
    (tmp_path / "pipeline").mkdir()
    shutil.copytree(wan, tmp_path / "pipeline/transformer")
    shutil.copytree(wan, tmp_path / "pipeline/transformer_2")
    two = open_source(tmp_path / "pipeline")
    assert (
        two.path.name == "transformer"
        and open_source(tmp_path / "pipeline", "transformer_2").path.name == "transformer_2"
    )
    assert one.entries.keys() == two.entries.keys()


def test_the_links_of_a_hubs_cache_are_followed(mesh, wan, tmp_path):
    """models--NAME/snapshots/HASH/FILE -> ../../blobs/HASH"""
    blobs, snapshot = (
        tmp_path / "models--some--wan/blobs",
        tmp_path / "models--some--wan/snapshots/0f/transformer",
    )
    shutil.copytree(wan, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    folder = imported(snapshot.parent, tmp_path / "run", mesh)
    assert (
        "generator started from `some/wan`"
        in (exported(folder, tmp_path / "out", mesh) / "README.md").read_text()
    )


@torch.no_grad()
def test_what_diffusers_leaves_unread_is_left_unread(mesh, tmp_path):
    """Wan2.1's image to video is published with a norm that no layer has."""
    original = WanTransformer3DModel(**SHAPE, image_dim=6, added_kv_proj_dim=48)
    original.save_pretrained(tmp_path / "wan")
    (file,) = (tmp_path / "wan").glob("*.safetensors")
    save_file(
        load_file(file) | {f"blocks.{i}.attn2.norm_added_q.weight": torch.ones(48) for i in range(2)}, file
    )
    WanTransformer3DModel.from_pretrained(tmp_path / "wan")
    folder = imported(tmp_path / "wan", tmp_path / "run", mesh)
    assert perform(Verify(str(folder), str(tmp_path / "wan")), mesh) == 0
    assert (
        tensors(exported(folder, tmp_path / "out", mesh) / "transformer").keys()
        == original.state_dict().keys()
    )


def test_verify_tells_equal_from_unequal(mesh, wan, tmp_path, capsys):
    def run(*argv):
        return perform(tyro.cli(Command, args=list(map(str, argv))), mesh)

    assert run("import", wan, tmp_path / "run", "--json", tmp_path / "import.json") == 0
    assert json.loads((tmp_path / "import.json").read_text())["bytes"] == sum(
        t.nbytes for t in tensors(wan).values()
    )
    assert run("verify", tmp_path / "run", wan, "--json", tmp_path / "verify.json") == 0
    assert json.loads((tmp_path / "verify.json").read_text())["difference"] < 1e-5
    file = sorted(wan.glob("*.safetensors"))[0]
    changed = load_file(file)
    name = next(iter(changed))
    changed[name][0] += 0.5
    save_file(changed, file)
    assert run("verify", tmp_path / "run", wan) == 1
    assert "NOT equal" in capsys.readouterr().out


def test_verify_takes_what_import_takes(mesh, wan, tmp_path):
    """A file without config.json beside it; weights of which all answers are zeros."""
    save_file({name: 0 * tensor for name, tensor in tensors(wan).items()}, tmp_path / "one.safetensors")
    one = open_source(tmp_path / "one.safetensors", config=str(wan / "config.json"))
    folder = str(import_checkpoint(one, counterpart_of(one.config, ""), tmp_path / "run", mesh))
    verify = Verify(folder, str(one.path), config=str(wan / "config.json"))
    assert perform(verify, mesh) == 0
    assert perform(replace(verify, source=str(wan), config=""), mesh) == 1
    with pytest.raises(ValueError, match="samples=0: must be at least 1"):
        replace(verify, samples=0)
    (tmp_path / "other.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ConvertError, match=r"is a FluxTransformer2DModel, \S+ a WanTransformer3DModel"):
        perform(replace(verify, config=str(tmp_path / "other.json")), mesh)


def test_what_does_not_fit_is_named(mesh, wan, tmp_path):
    def attempt(change, message, error=ConvertError):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(wan, folder)
        change(folder)
        with pytest.raises(error, match=message):
            imported(folder, tmp_path / "target", mesh)
        assert not list((tmp_path / "target").glob("checkpoints/iteration-*"))

    files = sorted(f.name for f in wan.glob("*.safetensors"))

    def with_config(**fields):
        return lambda folder: (folder / "config.json").write_text(
            json.dumps(json.loads((wan / "config.json").read_text()) | fields)
        )

    def with_tensors(change):
        def apply(folder):
            held = tensors(folder)
            change(held)
            for file in folder.glob("*.safetensors*"):
                file.unlink()
            save_file(held, folder / "model.safetensors")

        return apply

    def without(field):
        config = json.loads((wan / "config.json").read_text())
        return lambda folder: (folder / "config.json").write_text(
            json.dumps({key: value for key, value in config.items() if key != field})
        )

    attempt(
        without("num_layers"), r"broken: config\.json lacks num_layers, which a WanTransformer3DModel has"
    )
    attempt(with_config(patch_size=2), r"broken: no WanTransformer3DModel that can be converted")
    attempt(with_config(_class_name=["a"]), r"_class_name=\['a'\] is not known")
    attempt(
        with_config(_class_name="UNet"), r"_class_name='UNet' is not known; there are WanTransformer3DModel"
    )
    attempt(with_config(qk_norm=None), r"qk_norm=None of a WanTransformer3DModel is not supported")
    attempt(
        with_config(num_layers=3),
        r"lacks blocks\.2\.\S+, .* and \d+ more; config\.json describes another model",
    )
    attempt(
        with_config(ffn_dim=36),
        r"blocks\.0\.ffn\.net\.0\.proj\.weight has shape \(37, 48\), config\.json asks for \(36, 48\)",
    )
    attempt(with_tensors(lambda t: t.pop("proj_out.bias")), r"lacks proj_out\.bias")
    attempt(with_tensors(lambda t: t.update(extra=torch.ones(1))), r"has unknown extra")
    attempt(
        with_tensors(lambda t: t.update({"head.modulation": t.pop("scale_shift_table")})),
        r"WanTransformer3DModel\.from_single_file\(FILE",
    )
    attempt(
        with_tensors(lambda t: t.update({"proj_out.bias": torch.ones(16, dtype=torch.int8)})),
        r"proj_out\.bias has dtype I8",
    )
    attempt(
        with_tensors(lambda t: t.update({"blocks.0.attn1.to_q.bias": torch.ones(48)})),
        r"to_q\.bias.* become one tensor, and have dtypes",
    )
    attempt(
        lambda folder: (folder / files[1]).unlink(),
        rf"index\.json: names {files[1]} \(for \S+\), which is not there",
    )
    attempt(lambda folder: os.truncate(folder / files[0], 5000), rf"{files[0]}: is no whole safetensors file")
    attempt(
        lambda folder: save_file({"x": torch.ones(1)}, folder / files[0]),
        rf"{files[0]}: lacks \S+, which \S+index\.json says it holds",
    )
    attempt(lambda folder: (folder / "config.json").write_text("{"), r"config\.json: not JSON")
    attempt(
        lambda folder: (folder / "config.json").write_text("[" * 10**5), r"config\.json: nested too deeply"
    )

    def elsewhere(place):  # a link that lies outside, or leads nowhere
        def apply(folder):
            if not (tmp_path / "link").is_symlink():
                (tmp_path / "link").symlink_to(wan / files[0])
            index = json.loads((folder / INDEX).read_text())
            index["weight_map"] |= {
                name: place for name, file in index["weight_map"].items() if file == files[0]
            }
            (folder / INDEX).write_text(json.dumps(index))

        return apply

    for place in ("../link", "../nowhere", str(tmp_path / "link"), "", "."):
        attempt(elsewhere(place), rf"index\.json: names {re.escape(repr(place))} outside its folder")

    def loop(folder):
        (folder / files[0]).unlink()
        (folder / files[0]).symlink_to(files[0])

    attempt(loop, rf"index\.json: names {files[0]} \(for \S+\), which is not there")

    def only_pickle(folder):
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({}))

    attempt(only_pickle, r"only diffusion_pytorch_model\.bin, a pickle")
    with pytest.raises(ConvertError, match="does not exist"):
        open_source(tmp_path / "nowhere")


def test_targets_are_not_overwritten(mesh, wan, tmp_path):
    folder = imported(wan, tmp_path / "run", mesh)
    with pytest.raises(ConvertError, match="holds checkpoints already"):
        imported(wan, tmp_path / "run", mesh)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConvertError, match="exists already"):
        exported(folder, tmp_path / "out", mesh)
    with pytest.raises(ConvertError, match=r"model\.family='mmdit' has no counterpart"):
        counterpart_of_model(MMDiTConfig(), "here")


def test_the_command_line(wan, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "megatron_apt", "convert"]
    done = subprocess.run(
        [*command, "import", wan, tmp_path / "run"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "GB/s" in done.stdout and str(tmp_path / "run/checkpoints/iteration-00000000") in done.stdout
    with pytest.raises(SystemExit, match=r"config\.json does not exist"):
        main(["convert", "import", str(tmp_path), str(tmp_path / "other")])


def loaded(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after this code."""
    show = "import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{code}\n{show}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


def run_cli(*argv) -> str:
    """Code that runs a command."""
    return f"""
from megatron_apt.cli import main
try:
    main({[str(word) for word in argv]!r})
except SystemExit as ended:
    assert not ended.code, ended.code
"""


def test_options_are_printed_without_torch():
    assert not loaded(run_cli("convert", "import", "--help")) & {
        "torch",
        "numpy",
        "safetensors",
        "megatron.core",
    }


def test_import_and_export_wait_for_nothing_they_do_not_need(wan, tmp_path):
    heavy = {"megatron.core", "torch._dynamo", "torch._inductor", "transformers", "diffusers"}
    assert not loaded(run_cli("convert", "import", wan, tmp_path / "run")) & heavy
    assert not loaded(run_cli("convert", "export", tmp_path / "run", tmp_path / "out")) & (
        heavy | {"torch.distributed.checkpoint", "sympy"}
    )


def test_megatron_core_without_cuda_does_not_load_the_compiler():
    if not torch.cuda.is_available():
        assert not loaded("import megatron_apt, megatron.core") & {"torch._dynamo", "torch._inductor"}


@pytest.mark.parametrize("part_bytes", [2**14, 2**30])
def test_torch_and_megatron_core_read_what_was_imported(mesh, wan, tmp_path, part_bytes):
    folder = imported(wan, tmp_path / "run", mesh, part_bytes=part_bytes)
    ours = dict(store.read_tensors(folder))
    empty = {key: torch.empty_like(tensor) for key, tensor in ours.items()}
    dcp.load(dict(empty), storage_reader=FileSystemReader(folder), no_dist=True)
    assert all(torch.equal(empty[key], tensor) for key, tensor in ours.items())
    assert {
        key: (tuple(t.global_shape), t.dtype) for key, t in load_tensors_metadata(str(folder)).items()
    } == {key: (tuple(t.shape), t.dtype) for key, t in ours.items()}
    asked = {
        key: ShardedTensor.from_rank_offsets(key, torch.empty_like(tensor)) for key, tensor in ours.items()
    }
    assert all(torch.equal(tensor, ours[key]) for key, tensor in store.load(folder, asked).items())
    save_config(CheckpointingConfig("torch_dist"), str(tmp_path))
    assert json.loads((folder / "metadata.json").read_text()) == json.loads(
        (tmp_path / "metadata.json").read_text()
    )


class Killed(Exception):
    pass


def test_an_interrupted_import_goes_on_where_it_was(mesh, wan, tmp_path):
    total, seen = sum(t.nbytes for t in tensors(wan).values()), []

    def die(count):
        seen.append(count)
        if sum(seen) > total / 2:
            raise Killed

    with pytest.raises(ConvertError, match=r"part-\d+\.tmp: could not be written \(Killed"):
        imported(wan, tmp_path / "run", mesh, part_bytes=2**14, moved=die)
    work = tmp_path / "run/checkpoints/.import.tmp"
    done = [p for p in work.glob("part-*") if not p.suffix]
    times = {p: p.stat().st_mtime_ns for p in done}
    assert len(done) > 1 and store.latest(tmp_path / "run") is None
    counted = []
    folder = imported(wan, tmp_path / "run", mesh, part_bytes=2**14, moved=counted.append)
    assert sum(counted) == total
    assert all((folder / p.name).stat().st_mtime_ns == t for p, t in times.items())  # not written again
    out = exported(folder, tmp_path / "out", mesh)
    assert all(torch.equal(a, tensors(out / "transformer")[name]) for name, a in tensors(wan).items())


@pytest.mark.parametrize("step", ["import.json", "state.json", sums.SUMS, sums.SEAL, "latest"])
def test_an_import_killed_at_any_of_its_last_steps_goes_on(mesh, wan, tmp_path, monkeypatch, step):
    write = store.write_atomically

    def dies(path, text):
        if path.name == step:
            path.with_name(path.name + ".tmp").write_text(text[:10])
            raise Killed
        write(path, text)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(store, "write_atomically", dies)
        patch.setattr(sums, "write_atomically", dies)
        imported(wan, tmp_path / "run", mesh)
    folder = imported(wan, tmp_path / "run", mesh)
    assert store.latest(tmp_path / "run") == folder and store.damages(folder) == []
    with pytest.raises(ConvertError, match="holds checkpoints already"):
        imported(wan, tmp_path / "run", mesh)


def test_two_imports_do_not_meet(mesh, wan, tmp_path):
    with (
        FolderLock(tmp_path / "run", "import"),
        pytest.raises(FolderInUse, match=r"run: in use for import by process .*another target"),
    ):
        imported(wan, tmp_path / "run", mesh)


def test_an_import_of_another_source_starts_anew(mesh, wan, tmp_path):
    with pytest.raises(ConvertError, match=r"part-\d+\.tmp: could not be written \(Killed"):
        imported(wan, tmp_path / "run", mesh, part_bytes=2**14, moved=_die)
    changed = {name: tensor + 1 for name, tensor in tensors(wan).items()}
    for file in wan.glob("*.safetensors*"):
        file.unlink()
    save_file(changed, wan / "model.safetensors")
    folder = imported(wan, tmp_path / "run", mesh, part_bytes=2**14)
    out = exported(folder, tmp_path / "out", mesh)
    assert all(torch.equal(a, tensors(out / "transformer")[name]) for name, a in changed.items())


def _die(count):
    raise Killed


def test_an_interrupted_export_leaves_nothing_under_its_name(mesh, wan, tmp_path):
    folder, seen = imported(wan, tmp_path / "run", mesh), []

    def die(count):
        seen.append(count)
        if len(seen) > 40:
            raise Killed

    with pytest.raises(Killed):
        exported(folder, tmp_path / "out", mesh, shard_bytes=30_000, moved=die)
    assert not (tmp_path / "out").exists()
    finished = {
        f.name: f.stat().st_mtime_ns for f in (tmp_path / ".out.export.tmp/transformer").glob("*.safetensors")
    }
    assert finished
    out = exported(folder, tmp_path / "out", mesh, shard_bytes=30_000)
    assert all((out / "transformer" / name).stat().st_mtime_ns == t for name, t in finished.items())
    assert all(torch.equal(a, tensors(out / "transformer")[name]) for name, a in tensors(wan).items())


def test_a_damaged_checkpoint_is_not_exported(mesh, wan, tmp_path):
    folder = imported(wan, tmp_path / "run", mesh)
    (file,) = folder.glob("part-*/tensors.distcp")
    whole, state = file.read_bytes(), (folder / "state.json").read_text()

    def attempt(error, message):
        with pytest.raises(error, match=message):
            exported(folder, tmp_path / "out", mesh)
        assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]

    file.write_bytes(whole[:-2000] + bytes([whole[-2000] ^ 1]) + whole[-1999:])
    attempt(store.CheckpointError, r"tensors\.distcp: its SHA-256 differs from the committed one")
    file.write_bytes(whole[:5000])
    attempt(store.CheckpointError, r"tensors\.distcp: 5000 bytes, \d+ were committed")
    file.unlink()
    attempt(store.CheckpointError, r"tensors\.distcp: missing")
    file.write_bytes(whole)
    for model in ({**json.loads(state)["config"]["model"], "depth": "x"}, None):
        described = json.loads(state)
        described["config"]["model"] = model
        (folder / "state.json").write_text(json.dumps(described))
        attempt(store.CheckpointError, r"state\.json: config\.model")


def test_a_full_disk_is_called_so(mesh, wan, tmp_path, monkeypatch):
    """torch.save meets the error of the file it writes to and reports another."""

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            raise OSError(28, "No space left on device")

    original = importer._Hashed.__init__
    monkeypatch.setattr(importer._Hashed, "__init__", lambda self, file: original(self, Full(file)))
    with pytest.raises(ConvertError, match=r"No space left on device.*free disk space and import again"):
        imported(wan, tmp_path / "run", mesh)


def test_a_trained_checkpoint_is_exported_in_the_dtype_asked_for(mesh, wan, tmp_path):
    folder = imported(wan, tmp_path / "run", mesh)
    out = exported(folder, tmp_path / "out", mesh, dtype="float16")
    assert {t.dtype for t in tensors(out / "transformer").values()} == {torch.float16}
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "other" and str(tmp_path) not in card
    with pytest.raises(store.CheckpointError, match="keeps no average"):
        Checkpoint.open(str(folder), "ema")
    with pytest.raises(ConvertError, match="holds no discriminator"):
        exported(folder, tmp_path / "other", mesh, discriminator=True)
    assert not [path.name for path in tmp_path.iterdir() if "other" in path.name]


def test_numbers_that_float16_does_not_hold_are_named(mesh, wan, tmp_path):
    held = tensors(wan)
    held["proj_out.bias"][3] = 1e5
    for file in wan.glob("*.safetensors*"):
        file.unlink()
    save_file(held, wan / "model.safetensors")
    folder = imported(wan, tmp_path / "run", mesh)
    with pytest.raises(ConvertError, match=r"generator\.final\.linear\.bias has numbers beyond float16"):
        exported(folder, tmp_path / "out", mesh, dtype="float16")


def test_a_base_is_named_from_within(mesh, wan, tmp_path, monkeypatch):
    base = tmp_path / "some-pipeline"
    shutil.copytree(wan, base / "transformer")
    (base / "model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]})
    )
    folder = imported(base, tmp_path / "run", mesh)
    monkeypatch.chdir(base)
    card = (exported(folder, tmp_path / "out", mesh, base=".") / "README.md").read_text()
    assert "other parts of the pipeline copied from `some-pipeline`" in card


def test_any_licence_is_one_field_of_the_card(mesh, wan, tmp_path):
    out = exported(
        imported(wan, tmp_path / "run", mesh), tmp_path / "out", mesh, license="other: x\ntags: [y]"
    )
    head = yaml.safe_load((out / "README.md").read_text().split("\n---\n")[0].removeprefix("---"))
    assert head["license"] == "other: x\ntags: [y]" and head["tags"] == ["flow-matching"]
