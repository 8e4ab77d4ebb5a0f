"""What of a pipeline goes beside an exported generator: everything it needs, nothing that
runs, nothing from elsewhere; second networks go back.
"""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_apt.convert.command import Verify, perform
from megatron_apt.convert.counterparts import counterpart_of, counterpart_of_model
from megatron_apt.convert.errors import ConvertError
from megatron_apt.convert.exporter import Checkpoint, export_pipeline
from megatron_apt.convert.importer import import_checkpoint
from megatron_apt.convert.source import open_source
from megatron_apt.encoders.load import open_text_encoder
from support.pipelines import change_json, save_wan


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Of two networks, as Wan2.2."""
    folder = save_wan(tmp_path_factory.mktemp("hub"))
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    held = load_file(folder / "transformer_2/diffusion_pytorch_model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in held.items()},
        folder / "transformer_2/diffusion_pytorch_model.safetensors",
        {"format": "pt"},
    )
    change_json(
        folder / "model_index.json",
        transformer_2=["diffusers", "WanTransformer3DModel"],
        boundary_ratio=0.875,
    )
    return folder


@pytest.fixture(scope="module")
def runs(wan, mesh, tmp_path_factory):
    """The runs that its two networks are imported into."""
    root = tmp_path_factory.mktemp("runs")
    for part in ("transformer", "transformer_2"):
        source = open_source(wan, part)
        import_checkpoint(source, counterpart_of(source.config, ""), root / part, mesh)
    return root


def exported(
    run: Path, target: Path, mesh, base: Path | str = "", one_step: bool = False, **options
) -> list[str]:
    checkpoint = Checkpoint.open(str(run))
    if one_step:  # as a trained run's state.json tells
        config = checkpoint.state["config"] | {"method": "consistency"}
        checkpoint = replace(checkpoint, state=checkpoint.state | {"iteration": 7, "config": config})
    return export_pipeline(
        checkpoint, counterpart_of_model(checkpoint.model, ""), target, mesh, base=str(base), **options
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(
        torch.equal(tensor, right[name]) for name, tensor in left.items()
    )


def as_variant(folder: Path, late: bool) -> None:
    """The weights of a part as two shards of the variant fp16, in one of the two spellings of their names."""
    (file,) = folder.glob("*.safetensors")
    stem, held = file.stem, {name: tensor.half() for name, tensor in load_file(file).items()}
    file.unlink()
    shards = [
        f"{stem}-0000{i}-of-00002.fp16.safetensors" if late else f"{stem}.fp16-0000{i}-of-00002.safetensors"
        for i in (1, 2)
    ]
    places = {name: shards[i % 2] for i, name in enumerate(sorted(held))}
    for shard in shards:
        save_file(
            {name: tensor for name, tensor in held.items() if places[name] == shard},
            folder / shard,
            {"format": "pt"},
        )
    (folder / f"{stem}.safetensors.index.fp16.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
    )


@pytest.mark.parametrize("late", [False, True])
def test_a_pipeline_of_a_variant_is_exported_whole_under_plain_names(wan, mesh, tmp_path, late):
    from diffusers import DiffusionPipeline

    base = shutil.copytree(wan, tmp_path / "base")
    for part in ("transformer", "transformer_2", "text_encoder", "vae"):
        as_variant(base / part, late and part != "text_encoder")
    source = open_source(base)
    assert source.notes == ("weights of the variant fp16",)
    import_checkpoint(source, counterpart_of(source.config, ""), tmp_path / "run", mesh)
    assert exported(tmp_path / "run", tmp_path / "out", mesh, base) == []
    for part in ("transformer", "transformer_2", "text_encoder", "vae"):
        assert same(base / part, tmp_path / "out" / part), part
        assert not [file.name for file in (tmp_path / "out" / part).iterdir() if "fp16" in file.name]
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float16)
    assert torch.equal(
        pipeline.vae.state_dict()["quant_conv.weight"], weights(base / "vae")["quant_conv.weight"]
    )
    want = open_text_encoder(base).encode(["two steps"])[0]
    assert (
        torch.equal(open_text_encoder(tmp_path / "out").encode(["two steps"])[0], want)
        and want.abs().max() > 0
    )


def test_of_several_variants_the_plain_one_is_copied(wan, mesh, runs, tmp_path):
    base = shutil.copytree(wan, tmp_path / "base")
    save_file({"other": torch.ones(1)}, base / "vae/diffusion_pytorch_model.fp16.safetensors")
    assert exported(runs / "transformer", tmp_path / "out", mesh, base) == [
        "vae/diffusion_pytorch_model.fp16.safetensors"
    ]
    assert same(wan / "vae", tmp_path / "out/vae")


def test_a_second_network_goes_back_where_it_came_from(wan, mesh, runs, tmp_path, capsys):
    from diffusers import DiffusionPipeline

    exported(runs / "transformer_2", tmp_path / "out", mesh, wan)
    assert same(wan / "transformer", tmp_path / "out/transformer") and same(
        wan / "transformer_2", tmp_path / "out/transformer_2"
    )
    assert not same(wan / "transformer", wan / "transformer_2")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.config.boundary_ratio == 0.875 and pipeline.transformer_2 is not None
    assert "takes the place of `transformer_2`" in (tmp_path / "out/README.md").read_text()
    assert perform(Verify(str(runs / "transformer_2"), str(wan)), mesh) == 0  # against the one it is
    assert perform(Verify(str(runs / "transformer_2"), str(wan), subfolder="transformer"), mesh) == 1
    exported(runs / "transformer_2", tmp_path / "alone", mesh)
    assert (
        same(wan / "transformer_2", tmp_path / "alone/transformer_2")
        and not (tmp_path / "alone/transformer").exists()
    )
    assert perform(Verify(str(runs / "transformer_2"), str(tmp_path / "alone")), mesh) == 0
    exported(runs / "transformer_2", tmp_path / "first", mesh, wan, part="transformer")
    assert same(wan / "transformer_2", tmp_path / "first/transformer")


def test_an_older_import_and_later_stages_know_their_part_too(wan, mesh, runs, tmp_path):
    """By the path in state.json, and through the run that a stage started from."""
    checkpoint = Checkpoint.open(str(runs / "transformer_2"))
    assert (
        checkpoint.part == "transformer_2"
        and Checkpoint.open(str(runs / "transformer")).part == "transformer"
    )
    older = {key: value for key, value in checkpoint.state.items() if key != "part"}
    assert replace(checkpoint, state=older).part == "transformer_2"
    later = older | {"imported": None, "sources": {"generator": f"{runs / 'transformer_2'}:raw"}}
    assert replace(checkpoint, state=later).part == "transformer_2"
    gone = later | {"sources": {"generator": str(tmp_path / "gone")}}
    assert replace(checkpoint, state=gone).part is None


def test_a_second_network_that_makes_samples_in_one_step_stands_alone(wan, mesh, runs, tmp_path):
    from diffusers import DiffusionPipeline

    exported(runs / "transformer_2", tmp_path / "out", mesh, wan, one_step=True)
    assert (
        same(wan / "transformer_2", tmp_path / "out/transformer")
        and not (tmp_path / "out/transformer_2").exists()
    )
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.transformer_2 is None and pipeline.config.boundary_ratio is None
    assert (
        "stands alone as `transformer`, started from the `transformer_2`"
        in (tmp_path / "out/README.md").read_text()
    )


def test_a_base_without_a_second_network_does_not_take_one(wan, mesh, runs, tmp_path):
    base = shutil.copytree(wan, tmp_path / "base")
    change_json(base / "model_index.json", transformer_2=[None, None])
    with pytest.raises(
        ConvertError,
        match=r"has no transformer_2, which this checkpoint was imported as; .* --part transformer",
    ):
        exported(runs / "transformer_2", tmp_path / "out", mesh, base)


def test_only_files_of_known_kinds_are_copied(wan, mesh, runs, tmp_path):
    """Code, pickles, archives, hidden and linked folders, pipes: left out and said;
    nobody waits for a pipe.
    """
    base, ran = shutil.copytree(wan, tmp_path / "base"), tmp_path / "ran"

    class Runs:
        def __reduce__(self):
            return (os.mkdir, (str(ran),))

    places = [
        "vae/evil.py",
        "vae/pytorch_model.bin",
        "text_encoder/x.pt",
        "text_encoder/x.ckpt",
        "tokenizer/x.pkl",
        "vae/run.sh",
        "vae/x.so",
        "vae/x.zip",
    ]
    for place in places:
        (base / place).write_bytes(pickle.dumps(Runs()))
    (base / "vae/.git").mkdir()
    (base / "vae/.git/config").write_text("x")
    (base / "vae/.hidden.json").write_text("{}")
    (base / "vae/more").mkdir()
    (base / "vae/more/notes.txt").write_text("kept")
    (base / "vae/inner").symlink_to(base / "tokenizer")
    os.mkfifo(base / "vae/pipe.json")
    (base / "vae/LICENSE").write_text("free")
    os.chmod(base / "vae/LICENSE", 0o755)
    left = exported(runs / "transformer", tmp_path / "out", mesh, base)
    assert sorted(left) == sorted([*places, "vae/.git", "vae/.hidden.json", "vae/inner", "vae/pipe.json"])
    assert (tmp_path / "out/vae/more/notes.txt").read_text() == "kept" and (
        tmp_path / "out/vae/LICENSE"
    ).stat().st_mode & 0o111 == 0
    kinds = {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".md", ".txt", ".model", ""} and not ran.exists()
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]


@pytest.mark.parametrize(
    "place",
    ["vae/config.json", "vae/more.txt", "vae/diffusion_pytorch_model.safetensors", "vae", "tokenizer/deep"],
)
def test_links_out_of_the_base_are_not_followed(wan, mesh, runs, tmp_path, place):
    base, outside = shutil.copytree(wan, tmp_path / "base"), tmp_path / "outside"
    if (base / place).exists():
        shutil.move(base / place, outside)
    elif place.endswith("deep"):
        outside.mkdir()
    else:
        outside.write_text("secret")
    (base / place).symlink_to(outside)
    with pytest.raises(
        ConvertError,
        match=rf"{place}: is a link that leads out of the base, to \S+outside; .* put the file there itself",
    ):
        exported(runs / "transformer", tmp_path / "out", mesh, base)
    assert not (tmp_path / "out").exists()


def test_the_links_of_a_hubs_cache_are_files_of_the_base(wan, mesh, runs, tmp_path):
    """models--OWNER--NAME/snapshots/COMMIT/vae/FILE -> ../../../blobs/HASH; to another
    repository's blobs they are links out of it.
    """
    repository = tmp_path / "models--some--wan"
    snapshot, blobs = repository / "snapshots/0f", repository / "blobs"
    shutil.copytree(wan, snapshot)
    blobs.mkdir()
    for i, file in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        shutil.move(file, blobs / f"{i:064x}")
        file.symlink_to(os.path.relpath(blobs / f"{i:064x}", file.parent))
    assert exported(runs / "transformer", tmp_path / "out", mesh, snapshot) == []
    assert same(wan / "vae", tmp_path / "out/vae") and same(
        wan / "text_encoder", tmp_path / "out/text_encoder"
    )
    other = tmp_path / "models--other--wan/blobs"
    other.mkdir(parents=True)
    (other / "x").write_text("{}")
    (snapshot / "vae/config.json").unlink()
    (snapshot / "vae/config.json").symlink_to(other / "x")
    with pytest.raises(ConvertError, match=r"vae/config\.json: is a link that leads out of the base"):
        exported(runs / "transformer", tmp_path / "out2", mesh, snapshot)


def test_parts_without_whole_safetensors_are_refused(wan, mesh, runs, tmp_path):
    def attempt(change, message):
        base = shutil.copytree(wan, tmp_path / "base")
        change(base)
        with pytest.raises(ConvertError, match=message):
            exported(runs / "transformer", tmp_path / "out", mesh, base)
        shutil.rmtree(base)
        assert not (tmp_path / "out").exists()

    def pickled(base):
        (base / "text_encoder/model.safetensors").rename(base / "text_encoder/pytorch_model.bin")

    vae = "vae/diffusion_pytorch_model.safetensors"
    attempt(
        pickled,
        r"text_encoder: only pytorch_model\.bin, a pickle.* "
        r"save it with save_pretrained\(safe_serialization=True\)",
    )
    attempt(
        lambda base: (base / vae).unlink(),
        r"vae: no \.safetensors file; .*; a part whose weights are not whole",
    )
    attempt(lambda base: os.truncate(base / vae, 1000), r"is no whole safetensors file")
    attempt(
        lambda base: (base / vae).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "a pointer of git-lfs",
    )
    attempt(
        lambda base: change_json(base / "model_index.json", vae=["my_vae", "Vae"]),
        r"vae is \['my_vae', 'Vae'\].*code of their own are not copied",
    )
    attempt(
        lambda base: change_json(base / "model_index.json", scheduler=["os", "system"]),
        r"scheduler is \['os', 'system'\]",
    )
    attempt(
        lambda base: change_json(base / "model_index.json", vae=["diffusers", "__import__('os')"]), "vae is "
    )
    attempt(lambda base: change_json(base / "model_index.json", vae=[["a"], 3]), "vae is ")
    attempt(
        lambda base: change_json(base / "model_index.json", _class_name=["evil", "Pipeline"]),
        "is no pipeline of diffusers; .* code of their own",
    )


def test_fields_that_name_code_are_not_copied(wan, mesh, runs, tmp_path):
    base = shutil.copytree(wan, tmp_path / "base")
    kept = json.loads((base / "text_encoder/config.json").read_text())
    change_json(
        base / "text_encoder/config.json",
        auto_map={"AutoModel": "evil.Model"},
        attn_implementation="someone/kernel",
    )
    exported(runs / "transformer", tmp_path / "out", mesh, base)
    assert json.loads((tmp_path / "out/text_encoder/config.json").read_text()) == kept
    assert (tmp_path / "out/vae/config.json").read_bytes() == (wan / "vae/config.json").read_bytes()


def test_a_run_whose_origin_is_gone_does_not_guess(wan, mesh, runs, tmp_path):
    """Of two networks either may be meant; of one it is that."""
    checkpoint = Checkpoint.open(str(runs / "transformer"))
    lost = {key: value for key, value in checkpoint.state.items() if key not in ("imported", "part")} | {
        "sources": {"generator": "gone:raw"}
    }
    lost = replace(checkpoint, state=lost)
    family = counterpart_of_model(checkpoint.model, "")
    with pytest.raises(
        ConvertError,
        match=r"started from gone:raw, which is not there any more, .* "
        "transformer or transformer_2; say --part",
    ):
        export_pipeline(lost, family, tmp_path / "out", mesh, base=str(wan))
    export_pipeline(lost, family, tmp_path / "out", mesh, base=str(wan), part="transformer_2")
    assert same(wan / "transformer", tmp_path / "out/transformer_2") and same(
        wan / "transformer", tmp_path / "out/transformer"
    )
    export_pipeline(lost, family, tmp_path / "alone", mesh)
    assert same(wan / "transformer", tmp_path / "alone/transformer")
    with pytest.raises(
        ConvertError, match=r"part='\.\./x': a pipeline's networks are transformer and transformer_2"
    ):
        export_pipeline(lost, family, tmp_path / "out2", mesh, part="../x")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("iteration", -1),
        ("iteration", 1e18),
        ("ema", "no"),
        ("sources", {"generator": 3}),
        ("sources", None),
        ("imported", "x"),
        ("part", 5),
        ("values", []),
    ],
)
def test_a_state_of_other_types_is_named(runs, tmp_path, field, value):
    run = shutil.copytree(runs / "transformer", tmp_path / "run")
    change_json(run / "checkpoints/iteration-00000000/state.json", **{field: value})
    with pytest.raises(ValueError, match=rf"state\.json: {field}.*: Expected .*; the checkpoint is damaged"):
        Checkpoint.open(str(run))


def test_a_pipeline_of_another_kind_is_called_so(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(
        ConvertError, match=r"is a StableDiffusionPipeline, which has no transformer \(it has unet\)"
    ):
        open_source(tmp_path)
