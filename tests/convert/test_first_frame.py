"""Wan2.2 TI2V: a given first frame among the noisy ones, at time 0. Against diffusers,
methods, meshes, samplers, the whole way, refusals.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_apt.config import DataConfig, InitConfig, OptimizerConfig, ParallelConfig
from megatron_apt.convert.errors import ConvertError
from megatron_apt.data.batches import Batches, first_frames
from megatron_apt.data.microbatch import Microbatch
from megatron_apt.data.shards import LatentShards
from megatron_apt.demo.digits import write_digit_clips
from megatron_apt.encode.command import encode
from megatron_apt.encode.config import EncodeConfig
from megatron_apt.families.registry import build_backbone
from megatron_apt.families.wan.codec import WanCodec
from megatron_apt.families.wan.config import WanConfig
from megatron_apt.families.wan.weights import WEIGHTS as WAN
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.losses import squared_error
from megatron_apt.models.condition import Condition
from megatron_apt.models.embeddings import patchify
from megatron_apt.models.layout import build_layout
from megatron_apt.parallel.mesh import Axis
from megatron_apt.sample.command import load_generator, sample_latents, sample_to_files
from megatron_apt.sample.config import SampleConfig
from megatron_apt.sample.sampler import sample_noise
from support.conversions import PROMPT, assert_equal, convert, frames_of, imported, one_step, trained
from support.families import CONFIGS, assert_parity, compare
from support.parity import compare_exactly, deep, iterations, meshes, problem
from support.pipelines import change_json, save_wan, wan22_vae, wan_vae
from support.problems import VIDEOS, build, gradient_of, microbatch, run_config, run_phase

SEEDS = range(6)
UNIFORM = [(3, 3, 5)] * 3, [5] * 3
# Of one length but not of one grid; and a picture, which has no first frame, between clips.
ALIKE = [(2, 3, 4), (4, 3, 2), (3, 2, 4)], [5] * 3
PACKED = [(2, 3, 5), (1, 4, 3), (4, 2, 2)], [4, 7, 5]


def as_image_to_video(pipeline: Path) -> Path:
    """The same pipeline under the class that is given a picture."""
    folder = pipeline.with_name(f"{pipeline.name}-i2v")
    if not folder.exists():
        shutil.copytree(pipeline, folder)
        change_json(folder / "model_index.json", _class_name="WanImageToVideoPipeline")
    return folder


def config_of(seed: int) -> dict:
    """A random shape with patches of one frame and without image tokens; some have given channels too."""
    config = CONFIGS["wan"](seed)
    return config | {
        "patch_size": (1, *config["patch_size"][1:]),
        "image_dim": None,
        "added_kv_proj_dim": None,
    }


def compared(mesh, seed: int, problem, **options):
    return compare(mesh, "wan", config_of(seed), *problem, first_frame=True, **options)


@pytest.mark.parametrize("seed", SEEDS)
def test_velocities_and_gradients_equal_those_of_diffusers(mesh, seed):
    """fp32, every weight; diffusers is given a time for every token."""
    assert_parity(compared(mesh, seed, UNIFORM))
    assert_parity(compared(mesh, seed, ALIKE))
    assert_parity(compared(mesh, seed, PACKED, recompute="full"))


def test_with_kernels(mesh):
    assert_parity(compared(mesh, 0, PACKED, kernels=True))
    assert_parity(compared(mesh, 0, ALIKE, kernels=True))


def on_mesh(mesh, seed: int):
    even = tuple(values[:2] for values in UNIFORM)
    return [
        compared(mesh, seed, problem) for problem in (even, tuple(values[:2] for values in ALIKE), PACKED)
    ]


SPLIT = {name: parallel for name, parallel in meshes(2).items() if parallel.tp * parallel.cp == 2}


@pytest.mark.dist
@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_mesh_equals_diffusers(ranks, name, seed):
    for errors in ranks(2).run(on_mesh, SPLIT[name], seed):
        for one in errors:
            assert_parity(one)


def test_a_first_frame_that_lies_on_several_ranks(mesh):
    """Four context-parallel ranks, of whose chunks a first frame takes one and a part of
    the next: every given token is on one rank, once.
    """
    grids = ((2, 3, 5), (1, 4, 3), (2, 2, 2))
    whole = build_layout(grids, (3, 3, 3), mesh)
    parts = [build_layout(grids, (3, 3, 3), replace(mesh, cp=Axis(4, rank, None))) for rank in range(4)]
    assert whole.first.lengths == (15, 0, 4)
    assert [len(part.first.local) for part in parts] == [7 + 2, 8 + 2, 0, 0]
    assert sorted(torch.cat([part.first.index for part in parts]).tolist()) == list(range(19))
    for part in parts:
        assert torch.equal(
            whole.visual.index[whole.first.local][part.first.index], part.visual.index[part.first.local]
        )
        assert part.first.rows.total == part.visual.rows.total == len(part.visual.index)
        owner = part.first.rows.sample
        assert torch.equal(owner // 2, part.visual.sample)
        assert torch.equal((owner % 2 == 0).nonzero().flatten(), part.first.local)


# --- methods

MODEL = WanConfig(
    depth=2,
    width=48,
    heads=4,
    latent_channels=4,
    text_width=8,
    dtype="float64",
    first_frame=True,
)
MIXED = ((4, 1, 4, 4), (4, 2, 4, 6), (4, 3, 4, 4), (4, 2, 4, 6))


def given(batch: Microbatch) -> torch.Tensor:
    """Which tokens (T,) are given, from their positions alone."""
    clip = torch.tensor([shape[1] > 1 for shape in batch.shapes])
    return (batch.layout.positions[:, 0] == 0) & clip[batch.layout.visual.sample]


def settings(method: str):
    apt = AptConfig(
        ar1_lambda=10.0, ar2_lambda=1.0, head_layers=(0.5, 1.0), unmatched_conditions=True, timestep_shift=3.0
    )
    return run_config(method, MODEL, apt)


@pytest.mark.parametrize("shapes", [VIDEOS, MIXED])
@pytest.mark.parametrize("method", ["flow", "consistency", "apt"])
def test_every_network_sees_the_given_frame_clean_and_at_time_0(mesh, method, shapes):
    """In every pass: teacher, student and target; G; D on x, x_hat and their perturbations."""
    config = settings(method)
    described, networks, executor = build(config, mesh)
    batch, seen = microbatch(mesh, shapes, MODEL), []
    for network in networks.values():
        backbone = getattr(network.module, "backbone", network.module)
        times = []
        backbone.time_embed.register_forward_pre_hook(lambda _, args, times=times: times.append(args[0]))
        backbone.x_embed.register_forward_pre_hook(lambda _, args, times=times: seen.append((args[0], times)))
    for phase in described.phases:
        run_phase(executor, phase, [batch])
    assert len(seen) == {"flow": 1, "consistency": 3, "apt": 2 + 1 + 2 + 1}[method]
    for x, times in seen:
        t = times.pop(0)
        copies = len(t) // (2 * len(shapes))
        for version, label in zip(x.chunk(copies), t.view(copies, -1, 2), strict=True):
            assert torch.equal(version[given(batch)], batch.x[given(batch)])
            assert not torch.isclose(version[~given(batch)], batch.x[~given(batch)]).all() or method == "apt"
            assert (label[:, 0] == 0).all() and (label[:, 1] > 0).all()


def test_the_flow_loss_is_the_mean_over_what_is_generated(mesh):
    config = settings("flow")
    config = replace(config, flow=replace(config.flow, condition_dropout=0.0))
    described, networks, executor = build(config, mesh)
    batch = microbatch(mesh, MIXED, MODEL)
    (phase,) = described.phases
    metrics = run_phase(executor, phase, [batch])
    batch = batch.for_phase("flow")
    x_t, t = phase.branches[0].segments[0].feed(batch, {})
    with torch.no_grad():
        v = networks["generator"].module(x_t, t, batch.condition, batch.layout)
    error, generated = squared_error(v, batch.noise("z") - batch.x), ~given(batch)
    means = [float(error[generated & (batch.layout.visual.sample == i)].mean()) for i in range(len(MIXED))]
    assert float(metrics["loss"]) == pytest.approx(sum(means) / len(MIXED), rel=1e-12)


@pytest.mark.parametrize("method", ["consistency", "apt"])
def test_what_a_network_makes_of_the_given_frame_is_of_no_consequence(mesh, method):
    """Neither loss, statistics nor gradients change with it."""

    def measured(noise: float) -> tuple[dict, torch.Tensor]:
        described, networks, executor = build(settings(method), mesh)
        batch = microbatch(mesh, MIXED, MODEL)
        for name in {"generator", "teacher"} & networks.keys():
            module = networks[name].module
            last_layer, shift = module.last_layer, noise * given(batch).double()[:, None]
            module.last_layer = lambda state, layout, f=last_layer, s=shift: (
                f(state, layout) + s.repeat(layout.samples // 4, 1).unsqueeze(1)
            )
        metrics = [run_phase(executor, phase, [batch]) for phase in described.phases]
        gradients = [gradient_of(network) for network in networks.values() if network.shards is not None]
        return {name: float(value) for part in metrics for name, value in part.items()}, torch.cat(gradients)

    (values, gradients), (other_values, other_gradients) = measured(0.0), measured(3.0)
    assert other_values == pytest.approx(values, rel=1e-12)
    torch.testing.assert_close(other_gradients, gradients, rtol=1e-12, atol=1e-12)


# --- from pipeline to pipeline

SIZE = {"height": 64, "width": 96}
LATENT = (48, 2, 4, 6)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return save_wan(tmp_path_factory.mktemp("hub"), ti2v=True)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_digit_clips(tmp_path_factory.mktemp("clips"), count=5)


@pytest.fixture(scope="module")
def data(hub, clips, tmp_path_factory):
    """Encoded as for text to video."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    config = EncodeConfig(
        str(clips),
        str(folder),
        frames=5,
        codec="wan",
        codec_path=str(hub),
        text=str(hub),
        allow_upscale=True,
        **SIZE,
    )
    encode(config, progress=False)
    return folder


@torch.no_grad()
def test_first_frames_are_the_pipelines(hub, clips, data, pipeline_of):
    """The first latent of a clip is that of its first picture alone, of which the
    pipeline makes the condition.
    """
    pipeline, dataset = pipeline_of(as_image_to_video(hub)), LatentShards(data)
    assert dataset.shapes == [LATENT] * 5
    for sample, frame in zip((dataset[i] for i in range(5)), frames_of(clips, **SIZE), strict=True):
        pixels = pipeline.video_processor.preprocess(frame, **SIZE)
        _, condition, mask = pipeline.prepare_latents(
            pixels, 1, 48, num_frames=5, dtype=torch.float32, device=torch.device("cpu"), **SIZE
        )
        torch.testing.assert_close(
            sample.first_frame.latent, condition[0], rtol=0, atol=1e-6 * float(condition.abs().max())
        )
        assert mask.shape == (1, 1, *LATENT[1:]) and mask.sum(dim=(3, 4)).tolist() == [[[0.0, 24.0]]]


@pytest.mark.parametrize("tiling", [0, 64])
@pytest.mark.parametrize("vae", [wan_vae, wan22_vae])
def test_a_picture_has_the_first_latent_of_its_clip(vae, tiling, tmp_path):
    torch.manual_seed(0)
    vae().save_pretrained(tmp_path)
    codec = WanCodec(tmp_path, tiling=tiling)
    clip = 2 * torch.rand(3, 9, 128, 96) - 1
    latent = codec.encode(clip)
    assert (
        latent.shape == codec.latent_shape(*clip.shape[1:])
        and codec.pixel_size(*latent.shape[1:]) == clip.shape[1:]
    )
    assert torch.equal(codec.encode(clip[:, :1]), latent[:, :1])


def test_tiles_of_a_vae_that_folds_pixels(tmp_path):
    """Both ways as large as asked for: 128 x 192 pixels in tiles of 64 at every 48, the
    first of which is as it is alone.
    """
    torch.manual_seed(0)
    wan22_vae().save_pretrained(tmp_path)
    whole, tiled = WanCodec(tmp_path), WanCodec(tmp_path, tiling=64)
    sizes: dict[str, list] = {"encoder": [], "decoder": []}
    for name, found in sizes.items():
        getattr(tiled.vae, name).register_forward_pre_hook(
            lambda _, args, found=found: found.append(tuple(args[0].shape[-2:]))
        )
    pixels = 2 * torch.rand(3, 1, 128, 192) - 1
    latent = tiled.encode(pixels)
    decoded = tiled.decode(latent)
    assert latent.shape == (48, 1, 8, 12) and decoded.shape == pixels.shape
    assert len(sizes["encoder"]) == len(sizes["decoder"]) == 3 * 4
    assert max(sizes["encoder"]) == (32, 32) and max(sizes["decoder"]) == (4, 4)
    assert torch.equal(latent[..., :3, :3], whole.encode(pixels[..., :64, :64])[..., :3, :3])
    assert torch.equal(decoded[..., :48, :48], whole.decode(latent[..., :4, :4])[..., :48, :48])


@torch.no_grad()
def test_from_pipeline_to_pipeline(hub, clips, data, pipeline_of, mesh, tmp_path):
    base, pretrained = imported(mesh, hub, tmp_path / "pretrained"), str(tmp_path / "pretrained")
    assert not base.model.first_frame
    # The recipe says it; the checkpoint, imported as text to video, serves both.
    base = replace(
        base,
        model=replace(base.model, first_frame=True),
        data=DataConfig((str(data),), text_length=512),
    )
    with torch.enable_grad():
        tuned = trained(mesh, base, tmp_path / "flow", method="flow", init=InitConfig(generator=pretrained))
        distilled = trained(
            mesh, base, tmp_path / "consistency", method="consistency", init=InitConfig(diffusion=tuned)
        )
        final = trained(
            mesh,
            base,
            tmp_path / "apt",
            method="apt",
            apt=AptConfig(head_layers=(0.5, 1.0), ar1_sigma=0.1, timestep_shift=12.0),
            optimizer=OptimizerConfig(kind="rmsprop", lr=1e-4, ema=0.9),
            init=InitConfig(generator=distilled, diffusion=tuned),
        )
    out = tmp_path / "one-step"
    assert convert(mesh, "export", final, out, "--base", hub) == 0
    assert convert(mesh, "verify", final, out) == 0
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "WanImageToVideoPipeline" and index["expand_timesteps"] is True
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-to-video" in card and "pipeline(image, prompt, " in card

    pipeline, dataset, z = pipeline_of(out), LatentShards(data), torch.randn(LATENT)
    frames, options = (
        frames_of(clips, **SIZE),
        {"num_frames": 5, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", **SIZE},
    )
    theirs = pipeline(frames[1], PROMPT, latents=z[None], **options).frames[0]
    text, null = (Condition.pack(dataset.text_encoder().encode([prompt]), 512) for prompt in (PROMPT, ""))
    condition, other = (replace(text, **first_frames([dataset[i].first_frame], base.model)) for i in (1, 2))
    assert_equal(one_step(mesh, final, "ema", z, condition), theirs)
    assert torch.equal(one_step(mesh, final, "ema", z, condition)[:, :1], dataset[1].first_frame.latent)
    for run, weights, given in (
        (final, "ema", other),
        (final, "raw", condition),
        (pretrained, "raw", replace(text, first=None)),
    ):
        assert not torch.allclose(one_step(mesh, run, weights, z, given)[:, 1:], theirs[:, 1:], atol=1e-4)
    # Several guided steps on our grid, which evaluate the negative caption beside the same first frame.
    set_timesteps = pipeline.scheduler.set_timesteps
    pipeline.scheduler.set_timesteps = lambda count, device: set_timesteps(
        sigmas=[n / count for n in range(count, 0, -1)], device=device
    )
    ids = torch.zeros(1, dtype=torch.int64)
    ours = sample_latents(
        load_generator(final, mesh),
        mesh,
        condition,
        null,
        LATENT,
        ids,
        0,
        SampleConfig("", guidance=3.0, steps=4, euler=True),
    )[0]
    many = {
        **options,
        "guidance_scale": 3.0,
        "num_inference_steps": 4,
        "latents": sample_noise(0, ids, LATENT),
    }
    assert_equal(ours, pipeline(frames[1], PROMPT, "", **many).frames[0])
    sampled(final, data, frames[1], tmp_path)


def sampled(run: str, data: Path, frame: Image.Image, folder: Path) -> None:
    """`megatron-apt sample`: the dataset's own frames, a picture's, pictures from text,
    two steps, and what is refused.
    """
    captions = list(dict.fromkeys(LatentShards(data).captions))
    own = sample_to_files(SampleConfig(run, out=str(folder / "own")))
    frame.save(folder / "first.png")
    pictures = sample_to_files(SampleConfig(run, image=str(folder / "first.png"), out=str(folder / "given")))
    same = [a.read_bytes() == b.read_bytes() for a, b in zip(own[:-1], pictures[:-1], strict=True)]
    assert same == [caption == captions[1] for caption in captions]
    two = SampleConfig(
        run,
        image=str(folder / "first.png"),
        prompts=(PROMPT,),
        size=(2, 2, 4),
        steps=2,
        out=str(folder / "two"),
    )
    assert Image.open(sample_to_files(two)[0]).size == (5 * 64 + 4 * 2, 32)
    picture = replace(two, image="", size=(1, 4, 4), out=str(folder / "picture"))
    assert Image.open(sample_to_files(picture)[0]).size == (64, 64)
    with pytest.raises(ValueError, match="this model makes a sample of one frame from text; leave it out"):
        sample_to_files(replace(picture, image=str(folder / "first.png")))
    with pytest.raises(ValueError, match="add --image FILE to --prompts"):
        sample_to_files(SampleConfig(run, prompts=(PROMPT,), out=str(folder / "no")))


def test_imported_as_image_to_video(hub, data, mesh, tmp_path):
    """It is verified with a time for every token, samples from a picture, and goes out
    with its own scheduler.
    """
    run, out = tmp_path / "run", tmp_path / "out"
    assert convert(mesh, "import", hub, run, "--first-frame") == 0
    assert convert(mesh, "verify", run, hub) == 0
    assert convert(mesh, "export", run, out, "--base", hub) == 0
    index = json.loads((out / "model_index.json").read_text())
    assert (index["_class_name"], index["scheduler"][1]) == (
        "WanImageToVideoPipeline",
        "UniPCMultistepScheduler",
    )
    Image.new("RGB", (96, 64), "red").save(tmp_path / "red.png")
    wanted = SampleConfig(
        str(run),
        (PROMPT,),
        str(tmp_path / "red.png"),
        steps=3,
        weights="raw",
        dataset=str(data),
        out=str(tmp_path / "samples"),
    )
    assert len(sample_to_files(wanted)) == 1
    assert load_generator(str(run), mesh, "raw").model.model.first_frame


def test_bases_that_do_not_fit_are_refused(hub, data, mesh, tmp_path):
    base = replace(
        imported(mesh, hub, tmp_path / "pretrained"),
        data=DataConfig((str(data),), text_length=512),
        iterations=1,
    )
    start = InitConfig(diffusion=str(tmp_path / "pretrained"))
    text_to_video = trained(mesh, base, tmp_path / "text", method="consistency", init=start)
    with pytest.raises(ConvertError, match=r"this checkpoint was trained without: model.first_frame=False"):
        convert(mesh, "export", text_to_video, tmp_path / "out", "--base", as_image_to_video(hub))
    with pytest.raises(
        ConvertError, match=r"every second latent row and column for a token, model.patch=\(1, 2, 1\)"
    ):
        WAN.adapted({}, replace(MODEL, patch=(1, 2, 1)), hub, True)
    assert convert(mesh, "export", text_to_video, tmp_path / "out", "--base", hub) == 0
    assert json.loads((tmp_path / "out/model_index.json").read_text())["_class_name"] == "WanPipeline"


# --- refusals


def test_models_that_cannot_be_given_a_frame():
    with pytest.raises(ValueError, match=r"model.first_frame=True needs .*model.patch=\(2, 2, 2\)"):
        replace(MODEL, patch=(2, 2, 2))


def test_conditions_that_do_not_fit(mesh):
    batch, network = microbatch(mesh, VIDEOS, MODEL), build_backbone(MODEL, mesh)
    for first, message in (
        (None, "the condition has none"),
        (batch.condition.first[1:], "have 31 tokens, those of the samples"),
    ):
        with pytest.raises(ValueError, match=message):
            network(batch.x, batch.times(1.0), replace(batch.condition, first=first), batch.layout)


def test_a_codec_whose_first_latent_is_no_picture(clips, mesh, tmp_path):
    """And one whose is: the built-in codec does as well as a VAE."""
    for causal in (False, True):
        sizes = {
            "height": 8,
            "width": 16,
            "frames": 5 if causal else 4,
            "pixel_channels": 1,
            "pixel_causal": causal,
            "text_width": 8,
        }
        encode(EncodeConfig(str(clips), str(tmp_path / str(causal)), **sizes), progress=False)

    def batches(causal: bool) -> Batches:
        return Batches(DataConfig((str(tmp_path / str(causal)),)), MODEL, mesh, 0, 4, 4)

    with pytest.raises(
        ValueError,
        match="False: was encoded with pixel_causal=False, so a first latent frame holds several frames",
    ):
        batches(causal=False)
    (batch,) = batches(causal=True).iteration(0)
    firsts = [
        patchify(LatentShards(tmp_path / "True")[i].latent[None, :, :1], MODEL.patch)
        for i in batch.sample_ids
    ]
    assert all(
        torch.equal(condition.first, torch.cat(firsts).double())
        for condition in (batch.condition, batch.null, batch.negative)
    )


def test_pictures_train_beside_clips(datasets, mesh, tmp_path):
    """Microbatches of pictures alone, of clips alone, and of both."""
    data = DataConfig((str(datasets / "images"), str(datasets / "videos")), block=3)
    batches = [batch for i in range(3) for batch in Batches(data, MODEL, mesh, 0, 4, 2).iteration(i)]
    kinds = [[shape[1] > 1 for shape in batch.shapes] for batch in batches]
    assert (
        [False, False] in kinds
        and [True, True] in kinds
        and ([True, False] in kinds or [False, True] in kinds)
    )
    for batch in batches:
        assert torch.equal(batch.condition.first, batch.x[given(batch)])
    trained(
        mesh,
        replace(settings("flow"), data=data, micro_batch=2, tensorboard=False),
        tmp_path / "run",
        iterations=3,
    )


# --- several processes


@pytest.mark.dist
@pytest.mark.parametrize("method", ["apt", "consistency", pytest.param("flow", marks=pytest.mark.slow)])
def test_a_method_on_two_ranks_equals_one(ranks, mesh, method):
    """Two iterations, pictures among the clips: every loss, gradient, weight and average,
    in float64 to 1e-9.
    """
    config = problem(method, model=MODEL)
    want = iterations(mesh, config, "mixed", None, 2)
    for name in (
        "tp2-cp1-dp1",
        "tp2-sp-cp1-dp1",
        "tp1-cp2-ulysses-dp1",
        "tp1-cp2-all_gather-dp1",
        "tp1-cp1-dp2",
    ):
        for got in ranks(2).run(iterations, meshes(2)[name], config, "mixed", None, 2):
            compare_exactly(got, want)


@pytest.mark.dist
@pytest.mark.parametrize(
    "method", ["apt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("consistency", "flow"))]
)
def test_in_a_pipeline_equals_one(ranks, mesh, method):
    config = deep(method, model=MODEL)
    for data in ("mixed", "videos"):
        want = iterations(mesh, config, data, None, 2)
        for got in ranks(2).run(iterations, ParallelConfig(pp=2), config, data, None, 2):
            compare_exactly(got, want)
