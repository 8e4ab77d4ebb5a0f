"""Image to video: first frames against diffusers' WanImageToVideoPipeline, datasets and
training with them, the whole way, meshes, refusals.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_apt.config import DataConfig, InitConfig, OptimizerConfig, ParallelConfig
from megatron_apt.data.batches import Batches, first_frames
from megatron_apt.data.microbatch import mixed, rolled
from megatron_apt.data.shards import LatentShards
from megatron_apt.demo.digits import write_digit_clips
from megatron_apt.encode.command import encode
from megatron_apt.encode.config import EncodeConfig
from megatron_apt.encoders.image import ClipImageEncoder
from megatron_apt.families.wan.config import WanConfig
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.models.condition import Condition
from megatron_apt.models.config import ModelConfig
from megatron_apt.models.embeddings import patchify
from megatron_apt.sample.command import load_generator, sample_latents, sample_to_files
from megatron_apt.sample.config import SampleConfig
from megatron_apt.sample.sampler import sample_noise
from support.conversions import PROMPT, assert_equal, convert, frames_of, imported, one_step, trained
from support.parity import compare_exactly, deep, iterations, meshes, problem
from support.pipelines import change_json, save_wan_i2v

KINDS = {"clip": True, "plain": False}  # as Wan2.1 and as Wan2.2
SIZE = {"height": 32, "width": 48}
MODEL = WanConfig(
    latent_channels=4,
    condition_channels=8,
    text_width=16,
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_digit_clips(tmp_path_factory.mktemp("clips"), count=5)


def settings(clips, pipeline, output, **changes) -> EncodeConfig:
    base = EncodeConfig(
        str(clips),
        str(output),
        frames=5,
        codec="wan",
        codec_path=str(pipeline),
        text=str(pipeline),
        allow_upscale=True,
        **SIZE,
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def made(clips, tmp_path_factory):
    """kind -> (pipeline, dataset), made once."""
    known: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            pipeline = save_wan_i2v(folder, KINDS[kind])
            encode(settings(clips, pipeline, folder / "data", image_to_video=True), progress=False)
            known[kind] = pipeline, folder / "data"
        return known[kind]

    return make


# --- first frames


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_first_frames_are_the_pipelines(made, clips, pipeline_of, kind):
    folder, data = made(kind)
    pipeline, dataset = pipeline_of(folder), LatentShards(data)
    assert (dataset.given_channels, dataset.image_shape) == (8, (257, 20) if KINDS[kind] else None)
    for sample, frame in zip((dataset[i] for i in range(len(dataset))), frames_of(clips), strict=True):
        pixels = pipeline.video_processor.preprocess(frame, **SIZE)
        _, given = pipeline.prepare_latents(
            pixels, 1, 4, num_frames=5, dtype=torch.float32, device=torch.device("cpu"), **SIZE
        )
        torch.testing.assert_close(sample.given, given[0], rtol=0, atol=1e-6 * float(given.abs().max()))
        assert torch.equal(sample.given[:4], given[0, :4])
        assert not torch.allclose(sample.given[4:], sample.latent)
        if KINDS[kind]:
            assert torch.equal(sample.image, pipeline.encode_image(frame)[0])
        else:
            assert sample.image is None


def test_without_the_option_nothing_changes(made, clips, tmp_path):
    pipeline, data = made("clip")
    info = encode(settings(clips, pipeline, tmp_path / "text"), progress=False)
    assert "first_frame" not in info and not {"image_to_video", "image_encoder"} & info["settings"].keys()
    dataset, framed = LatentShards(tmp_path / "text"), LatentShards(data)
    assert (dataset.given_channels, dataset.image_shape, dataset[0].given, dataset.image_encoder()) == (
        0,
        None,
        None,
        None,
    )
    assert (
        json.loads((tmp_path / "text/index.jsonl").read_text().splitlines()[0])
        .keys()
        .isdisjoint({"given", "image"})
    )
    assert all(
        torch.equal(dataset[i].latent, framed[i].latent) and torch.equal(dataset[i].text, framed[i].text)
        for i in range(5)
    )


def test_an_image_encoder_of_another_folder(made, clips, tmp_path):
    """As for text from elsewhere: the same tokens as from the pipeline that is given as text."""
    pipeline, data = made("clip")
    config = settings(
        clips,
        pipeline,
        tmp_path / "data",
        text="builtin",
        text_width=16,
        image_to_video=True,
        image_encoder=str(pipeline),
    )
    encode(config, progress=False)
    dataset, other = LatentShards(tmp_path / "data"), LatentShards(data)
    assert all(
        torch.equal(dataset[i].image, other[i].image) and torch.equal(dataset[i].given, other[i].given)
        for i in range(5)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codec": "pixel", "codec_path": ""}, "image_to_video=True: needs codec='wan', not 'pixel'"),
        ({"frames": 1}, "frames=1: with image_to_video"),
        ({"image_to_video": False, "image_encoder": "x"}, "image_encoder='x': applies with image_to_video"),
        ({"image_encoder": "/nowhere"}, "/nowhere/model_index.json does not exist"),
    ],
)
def test_settings_that_do_not_fit(made, clips, tmp_path, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        encode(
            settings(clips, made("clip")[0], tmp_path / "out", **{"image_to_video": True, **change}),
            progress=False,
        )


def test_pipelines_without_a_readable_image_encoder_are_refused(made, tmp_path):
    def message(name: str, change) -> str:
        folder = tmp_path / name
        shutil.copytree(made("clip")[0], folder)
        change(folder)
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            ClipImageEncoder(folder)
        return str(caught.value)

    def indexed(**changes):
        return lambda folder: change_json(folder / "model_index.json", **changes)

    assert "names no image_encoder" in message("none", indexed(image_encoder=[None, None]))
    assert "must name an image processor" in message(
        "class", indexed(image_processor=["transformers", "T5Config"])
    )
    assert "preprocessor_config.json does not exist" in message(
        "processor", lambda f: shutil.rmtree(f / "image_processor")
    )
    assert "image_encoder/config.json does not exist" in message(
        "model", lambda f: shutil.rmtree(f / "image_encoder")
    )
    assert "no *.safetensors" in message(
        "weights", lambda f: (f / "image_encoder/model.safetensors").unlink()
    )


# --- microbatches


def test_every_condition_has_its_samples_own_first_frame(made, mesh):
    _, data = made("clip")
    model, dataset = replace(MODEL, image_width=20), LatentShards(data)
    (batch,) = Batches(
        DataConfig(shards=(str(data),), text_length=8, block=2), model, mesh, 0, 4, 4
    ).iteration(0)
    samples = [dataset[i] for i in batch.sample_ids]
    visual = torch.cat([patchify(sample.given[None], model.patch) for sample in samples])
    image = torch.stack([sample.image for sample in samples])
    both = mixed(batch.null, batch.condition, [True, False, True, False])
    for condition in (batch.condition, batch.null, batch.negative, both, rolled(batch.condition)):
        assert torch.equal(condition.visual, visual) and torch.equal(condition.image, image)
    assert torch.equal(both.tokens[:8], batch.null.tokens[:8]) and torch.equal(
        both.tokens[8:16], batch.condition.tokens[8:16]
    )
    text_only = Batches(
        DataConfig(shards=(str(data),)), replace(MODEL, condition_channels=0), mesh, 0, 4, 4
    ).iteration(0)[0]
    assert (text_only.condition.visual, text_only.condition.image) == (None, None)


def test_datasets_that_do_not_fit_are_refused_by_name(made, clips, mesh, tmp_path):
    (pipeline, with_clip), (_, plain) = made("clip"), made("plain")
    encode(settings(clips, pipeline, tmp_path / "text"), progress=False)

    def message(data: Path, model: ModelConfig) -> str:
        with pytest.raises(ValueError) as caught:
            Batches(DataConfig(shards=(str(data),)), model, mesh, 0, 4, 4)
        assert str(data) in str(caught.value)
        return str(caught.value)

    image = replace(MODEL, image_width=20)
    assert "holds no first frames, model.condition_channels=8" in message(tmp_path / "text", MODEL)
    assert "have 8 channels (mask and latent), model.condition_channels=20" in message(
        plain, replace(MODEL, condition_channels=20)
    )
    assert "holds no image tokens, this model reads 257 x 20" in message(plain, image)
    assert "holds image tokens of 257 x 20, this model reads 257 x 1280" in message(
        with_clip, replace(MODEL, image_width=1280)
    )
    assert "257 x 20, this model reads 50 x 20" in message(
        with_clip, replace(MODEL, image_width=20, image_tokens=50)
    )


# --- the whole way


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_from_pipeline_to_pipeline(made, clips, pipeline_of, mesh, tmp_path, kind):
    folder, data = made(kind)
    base = replace(
        imported(mesh, folder, tmp_path / "pretrained"), data=DataConfig(shards=(str(data),), text_length=512)
    )
    assert (base.model.condition_channels, base.model.image_width) == (8, 20 if KINDS[kind] else 0)
    pretrained = str(tmp_path / "pretrained")
    with torch.enable_grad():
        distilled = trained(
            mesh, base, tmp_path / "consistency", method="consistency", init=InitConfig(diffusion=pretrained)
        )
        final = trained(
            mesh,
            base,
            tmp_path / "apt",
            method="apt",
            apt=AptConfig(
                head_layers=(0.5, 1.0), ar1_sigma=0.1, timestep_shift=12.0, unmatched_conditions=True
            ),
            optimizer=OptimizerConfig(kind="rmsprop", lr=1e-4, ema=0.9),
            init=InitConfig(generator=distilled, diffusion=pretrained),
        )
    out = tmp_path / "one-step"
    assert convert(mesh, "export", final, out, "--base", folder) == 0
    assert convert(mesh, "verify", final, out) == 0
    assert (out / "image_encoder").is_dir() == (out / "image_processor").is_dir() == KINDS[kind]
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-to-video" in card and "pipeline(image, prompt, " in card
    pipeline, dataset, z = pipeline_of(out), LatentShards(data), torch.randn(4, 2, 4, 6)
    frames, options = (
        frames_of(clips),
        {"num_frames": 5, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", **SIZE},
    )
    theirs = pipeline(frames[1], PROMPT, latents=z[None], **options).frames[0]
    text = Condition.pack(dataset.text_encoder().encode([PROMPT]), 512)
    condition = replace(text, **first_frames([dataset[1].first_frame], base.model))
    assert_equal(one_step(mesh, final, "ema", z, condition), theirs)
    other = replace(text, **first_frames([dataset[2].first_frame], base.model))
    assert not torch.allclose(one_step(mesh, final, "ema", z, other), theirs, atol=1e-3)
    assert not torch.allclose(one_step(mesh, pretrained, "raw", z, condition), theirs, atol=1e-3)
    # Guided, which evaluates the negative caption beside the same first frame.
    shape, ids, null = (
        (4, 2, 4, 6),
        torch.zeros(1, dtype=torch.int64),
        Condition.pack(dataset.text_encoder().encode([""]), 512),
    )
    guided = SampleConfig("", guidance=3.0, euler=True)
    ours = sample_latents(load_generator(final, mesh), mesh, condition, null, shape, ids, 0, guided)[0]
    theirs = pipeline(
        frames[1], PROMPT, "", latents=sample_noise(0, ids, shape), **{**options, "guidance_scale": 3.0}
    ).frames[0]
    assert_equal(ours, theirs)
    sampled(final, data, frames[1], tmp_path)


def sampled(run: str, data: Path, frame: Image.Image, folder: Path) -> None:
    """`megatron-apt sample`: the dataset's own frames, a picture's, guidance, and what is refused."""
    captions = list(dict.fromkeys(LatentShards(data).captions))
    own = sample_to_files(SampleConfig(run, out=str(folder / "own")))
    assert len(own) == len(captions) + 1
    frame.save(folder / "first.png")
    given = SampleConfig(run, image=str(folder / "first.png"), out=str(folder / "given"))
    pictures = sample_to_files(given)
    assert len(pictures) == len(own)
    # The second clip's frame gives the second caption's clip again, and no other.
    same = [a.read_bytes() == b.read_bytes() for a, b in zip(own[:-1], pictures[:-1], strict=True)]
    assert same == [caption == captions[1] for caption in captions]
    guided = sample_to_files(
        replace(
            given,
            prompts=(PROMPT,),
            size=(1, 4, 8),
            steps=2,
            guidance=3.0,
            euler=True,
            out=str(folder / "guided"),
        )
    )
    assert Image.open(guided[0]).size == (64, 32)
    with pytest.raises(ValueError, match="add --image FILE to --prompts"):
        sample_to_files(SampleConfig(run, prompts=(PROMPT,), out=str(folder / "no")))
    with pytest.raises(ValueError, match=r"size=\(2, 4, 8\): the dataset's first frames are of \(2, 4, 6\)"):
        sample_to_files(SampleConfig(run, size=(2, 4, 8), out=str(folder / "no")))


# --- several processes

PARALLEL = replace(MODEL, depth=2, width=48, text_width=8, dtype="float64", image_width=12, image_tokens=5)
SPLIT = {"tp2-sp-cp1-dp1", "tp1-cp2-ulysses-dp1", "tp1-cp2-all_gather-dp1"}


@pytest.mark.dist
def test_apt_on_two_ranks_equals_apt_on_one(ranks, mesh):
    """Two iterations on clips of several sizes: every loss, gradient, weight and average
    of both networks, in float64 to 1e-9.
    """
    config = problem(model=PARALLEL)
    want = iterations(mesh, config, "mixed", None, 2)
    for name in sorted(SPLIT):
        for got in ranks(2).run(iterations, meshes(2)[name], config, "mixed", None, 2):
            compare_exactly(got, want)


@pytest.mark.dist
@pytest.mark.parametrize("method", ["apt", "consistency"])
def test_in_a_pipeline_equals_one(ranks, mesh, method):
    config = deep(method, model=PARALLEL)
    want = iterations(mesh, config, "mixed", None, 2)
    for got in ranks(2).run(iterations, ParallelConfig(pp=2), config, "mixed", None, 2):
        compare_exactly(got, want)
