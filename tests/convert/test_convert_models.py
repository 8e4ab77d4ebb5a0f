"""Published families against diffusers: from the same weights the same velocities and the
same gradients, on one process and on meshes.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from megatron_apt.config import DataConfig, ParallelConfig
from megatron_apt.convert.command import Verify, perform
from megatron_apt.convert.counterparts import counterpart_of
from megatron_apt.convert.exporter import Checkpoint, export_pipeline
from megatron_apt.convert.importer import import_checkpoint
from megatron_apt.convert.source import open_source
from megatron_apt.convert.verify import parity
from megatron_apt.data.batches import Batches
from megatron_apt.families.flux.config import FluxConfig
from megatron_apt.families.hunyuan.config import HunyuanConfig
from megatron_apt.families.registry import build_backbone
from megatron_apt.families.sd3.config import Sd3Config
from megatron_apt.families.sd3.weights import WEIGHTS as SD3
from megatron_apt.families.wan.config import WanConfig
from megatron_apt.models import parameters
from megatron_apt.models.condition import Condition
from megatron_apt.models.layout import build_layout
from megatron_apt.sample.command import load_generator
from megatron_apt.training.train import Trainer, train
from support.families import CONFIGS, FAMILIES, TOLERANCE, assert_parity, compare, shape, theirs
from support.parity import compare_exactly, deep, iterations, meshes, problem
from support.runs import config as training

SEEDS = range(8)
CASES = [(family, seed) for family in FAMILIES for seed in SEEDS]
PICTURES = ("sd3", "flux")
# Grids of tokens and lengths of texts: one size, and several in one microbatch.
UNIFORM = {family: ([(1 if family in PICTURES else 2, 3, 5)] * 3, [5] * 3) for family in FAMILIES}
PACKED = {
    family: ([(1, 3, 5), (1, 7, 2)] if family in PICTURES else [(2, 3, 5), (1, 4, 3)], [4, 7])
    for family in FAMILIES
}


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_velocities_and_gradients_equal_those_of_diffusers(mesh, family, seed):
    config = CONFIGS[family](seed)
    assert_parity(compare(mesh, family, config, *UNIFORM[family]))
    assert_parity(compare(mesh, family, config, *PACKED[family], recompute="full"))


@pytest.mark.parametrize(
    ("family", "seed"), [("wan", 2), ("sd3", 3), ("sd3", 7), ("flux", 3), ("hunyuan", 1)]
)
def test_with_kernels(mesh, family, seed):
    assert_parity(compare(mesh, family, CONFIGS[family](seed), *PACKED[family], kernels=True))


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_import_and_export_change_no_bit_and_no_shape(mesh, family, seed):
    described, architecture = FAMILIES[family]
    config = CONFIGS[family](seed)
    state, model = theirs(family, config, seed=1).state_dict(), shape(family, config)
    exported = {}
    for one in described.tensors(model, mesh):
        inside = one.change.ours([state[key] for key in one.theirs])
        assert inside.shape == one.shape
        exported |= dict(zip(one.theirs, one.change.theirs(inside), strict=True))
        assert all(exported[key].shape == size for key, size in one.theirs.items())
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[key], value) for key, value in state.items())
    written = described.write_config(model)
    assert shape(family, written) == model
    assert {key: t.shape for key, t in architecture.from_config(written).state_dict().items()} == {
        key: t.shape for key, t in state.items()
    }


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_a_model_on_meta_has_the_parameters_of_one_with_layers(mesh, family, seed):
    model = shape(family, CONFIGS[family](seed))

    def facts(network):
        return {
            name: (
                tuple(p.shape),
                p.dtype,
                p.sharded_dim,
                p.tp_partial,
                p.fixed,
                p.requires_grad,
                p.initial.__qualname__,
            )
            for name, p in network.named_parameters()
        }

    with torch.device("meta"):
        described = build_backbone(model, replace(mesh, device=torch.device("meta")))
    assert facts(described) == facts(build_backbone(model, mesh))
    assert all(p.is_meta for p in described.parameters())


# --- several processes


def on_mesh(mesh, family, seeds=SEEDS):
    """Errors of these configurations, of samples of one size where the seed is even, of a
    packed microbatch where it is odd.
    """
    pair = [values[:2] for values in UNIFORM[family]]
    return [
        compare(mesh, family, CONFIGS[family](seed), *(PACKED[family] if seed % 2 else pair))
        for seed in seeds
    ]


def check_mesh(ranks, world, parallel, family, seeds=SEEDS):
    for errors in ranks(world).run(on_mesh, parallel, family, seeds):
        for seed, one in zip(seeds, errors, strict=True):
            assert_parity(one, f"{family} {seed}: ")


SPLIT = {name: parallel for name, parallel in meshes(2).items() if parallel.tp * parallel.cp == 2} | {
    "pp2": ParallelConfig(pp=2)
}
# Two configurations on each mesh, every configuration on one
SHARE = {name: (2 * i % len(SEEDS), (2 * i + 1) % len(SEEDS)) for i, name in enumerate(SPLIT)}


@pytest.mark.dist
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SPLIT)
def test_a_mesh_equals_diffusers(ranks, name, family):
    check_mesh(ranks, 2, SPLIT[name], family, SHARE[name])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SPLIT)
def test_every_configuration_on_a_mesh_equals_diffusers(ranks, name, family):
    check_mesh(ranks, 2, SPLIT[name], family)


PAIRS = {
    "tp2-pp2": ParallelConfig(tp=2, pp=2),
    "cp2-pp2": ParallelConfig(cp=2, pp=2),
    # Some configurations have two heads
    "tp2-cp2": ParallelConfig(tp=2, cp=2, context_parallel="all_gather"),
}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PAIRS)
def test_four_ranks_equal_diffusers(ranks, name, family):
    check_mesh(ranks, 4, PAIRS[name], family)


def verified(mesh, run, folder):
    file = Path(run).with_name(f"verified-{mesh.world.rank}.json")
    code = perform(Verify(run, folder, json=str(file)), mesh)
    return code, json.loads(file.read_text())["difference"] if mesh.is_main else None


def but_slow(*families: str) -> list:
    """Every family, these in `make test-all` alone."""
    return [pytest.param(name, marks=pytest.mark.slow if name in families else ()) for name in FAMILIES]


@pytest.mark.dist
@pytest.mark.parametrize("family", but_slow("sd3", "hunyuan"))
def test_verify_on_a_mesh(ranks, mesh, tmp_path, family):
    """Also notices one number that is wrong: in the last block's second half of heads,
    which only some ranks hold.
    """
    model = theirs(family, CONFIGS[family](4), seed=1)
    model.save_pretrained(tmp_path / "their")
    source = open_source(tmp_path / "their")
    import_checkpoint(source, counterpart_of(source.config, "x"), tmp_path / "run", mesh)
    for name in ("tp2-sp-cp1-dp1", "tp1-cp2-ulysses-dp1", "pp2"):
        answers = ranks(2).run(verified, SPLIT[name], str(tmp_path / "run"), str(tmp_path / "their"))
        assert [code for code, _ in answers] == [0, 0] and 0 <= answers[0][1] < 1e-6, (name, answers)
    with torch.no_grad():
        list(p for name, p in model.named_parameters() if name.endswith("to_v.weight"))[-1][-1] += 1.0
    model.save_pretrained(tmp_path / "their")
    answers = ranks(2).run(verified, SPLIT["tp2-sp-cp1-dp1"], str(tmp_path / "run"), str(tmp_path / "their"))
    assert [code for code, _ in answers] == [1, 1] and answers[0][1] > 1e-3


SMALL = {
    "wan": WanConfig(
        depth=2,
        width=48,
        heads=4,
        latent_channels=4,
        text_width=8,
        dtype="float64",
    ),
    "sd3": Sd3Config(
        depth=2,
        width=48,
        heads=4,
        latent_channels=4,
        text_width=8,
        dtype="float64",
        pooled_width=12,
        position_size=6,
        sample_size=8,
        qk_norm=True,
        dual_layers=(0,),
    ),
    "flux": FluxConfig(
        depth=2,
        width=48,
        heads=4,
        latent_channels=4,
        text_width=8,
        dtype="float64",
        double_blocks=1,
        pooled_width=12,
        rope_axes=(4, 4, 4),
    ),
    "hunyuan": HunyuanConfig(
        depth=2,
        width=48,
        heads=4,
        latent_channels=4,
        text_width=8,
        dtype="float64",
        double_blocks=1,
        refiner_blocks=1,
        pooled_width=12,
        rope_axes=(4, 4, 4),
    ),
}
DATA = {"wan": "mixed", "sd3": "pictures", "flux": "pictures", "hunyuan": "mixed"}


@pytest.mark.dist
@pytest.mark.parametrize("family", but_slow("sd3", "flux"))
def test_apt_on_two_ranks_equals_apt_on_one(ranks, mesh, family):
    """Two iterations: every loss, gradient, weight and average of both networks, in float64 to 1e-9."""
    config, data = problem(model=SMALL[family]), DATA[family]
    want = iterations(mesh, config, data, None, 2)
    for name in ("tp2-sp-cp1-dp1", "tp1-cp2-ulysses-dp1", "tp1-cp2-all_gather-dp1"):
        for got in ranks(2).run(iterations, SPLIT[name], config, data, None, 2):
            compare_exactly(got, want)


@pytest.mark.dist
@pytest.mark.parametrize("family", but_slow("wan", "hunyuan"))
def test_apt_in_a_pipeline_equals_apt_on_one(ranks, mesh, family):
    config, data = deep(model=SMALL[family]), DATA[family]
    want = iterations(mesh, config, data, None, 2)
    for got in ranks(2).run(iterations, ParallelConfig(pp=2), config, data, None, 2):
        compare_exactly(got, want)


# --- files


@pytest.mark.parametrize(
    ("family", "seed"), [("wan", 2), ("sd3", 3), ("sd3", 7), ("flux", 3), ("hunyuan", 1)]
)
def test_a_folder_of_diffusers_comes_in_and_goes_out(mesh, tmp_path, family, seed):
    described, original = FAMILIES[family][0], theirs(family, CONFIGS[family](seed), seed=1)
    original.save_pretrained(tmp_path / "original")
    source = open_source(tmp_path / "original")
    assert counterpart_of(source.config, "") is described
    import_checkpoint(source, described, tmp_path / "run", mesh)
    checkpoint = Checkpoint.open(str(tmp_path / "run"))
    assert replace(checkpoint.model, dtype="float32", recompute="none") == shape(
        family, CONFIGS[family](seed)
    )
    assert (
        parity(str(tmp_path / "run"), described, checkpoint.model, source, mesh, samples=2, seed=0)
        <= TOLERANCE
    )
    export_pipeline(checkpoint, described, tmp_path / "out", mesh)
    exported = type(original).from_pretrained(tmp_path / "out" / "transformer")
    # Whose dtype is that of the weights
    assert replace(described.read_config(dict(exported.config)), dtype="float32") == checkpoint.model
    state = exported.state_dict()
    assert all(torch.equal(state[key], value) for key, value in original.state_dict().items())


# --- the table of positions


def test_the_table_begins_as_that_of_diffusers(mesh):
    config = CONFIGS["sd3"](7)
    network = build_backbone(shape("sd3", config), mesh)
    parameters.initialise(network, mesh, seed=0)
    assert torch.equal(network.position_table, SD3Transformer2DModel(**config).pos_embed.pos_embed[0])


@pytest.mark.parametrize(
    ("grid", "message"), [((2, 3, 3), "2 x 3 x 3"), ((1, 7, 3), "at most model.position_size=6")]
)
def test_pictures_that_the_table_does_not_cover_are_refused(mesh, grid, message):
    model = SMALL["sd3"]
    network, layout = build_backbone(model, mesh), build_layout((grid,), (3,), mesh)
    condition = Condition.pack(
        [torch.zeros(3, 8, dtype=torch.float64)], pooled=torch.zeros(1, 12, dtype=torch.float64)
    )
    x, t = (
        torch.zeros(size, dtype=torch.float64) for size in ((len(layout.positions), model.patch_width), (1,))
    )
    with pytest.raises(ValueError, match=message):
        network(x, t, condition, layout)


def pictures(datasets, output, method="flow", **changes):
    """A run on digits, whose pooled text is the mean of their captions'."""
    own = dict(pooled_width=8, position_size=6, sample_size=8, qk_norm=True, dual_layers=(1,))
    model = replace(SMALL["sd3"], dtype="bfloat16", latent_channels=4, **own)
    return training(
        datasets,
        output,
        method,
        model=model,
        data=DataConfig(shards=(str(datasets / "images"),), text_length=5),
        iterations=2,
        **changes,
    )


def test_the_table_is_in_checkpoints_but_never_trained(mesh, datasets, tmp_path):
    run = pictures(datasets, tmp_path / "run")
    trainer = Trainer(run, mesh)
    network = trainer.networks["generator"]
    with torch.no_grad():  # as of a published checkpoint, which initialisation does not know
        network.module.position_table.normal_()
    table = network.module.position_table.clone()
    trainer.step()
    assert torch.equal(network.module.position_table, table)
    assert dict(network.module.named_parameters()).keys() - set(network.shards.names) == {"position_table"}
    assert [key for key in network.sharded_state() if "position_table" in key] == ["generator.position_table"]
    trainer.save()
    trainer.checkpoints.commit()
    assert torch.equal(Trainer(run, mesh).networks["generator"].module.position_table, table)
    for weights in ("ema", "raw"):
        loaded = load_generator(run.output, mesh, weights).model
        assert torch.equal(loaded.position_table, table)
        export_pipeline(Checkpoint.open(run.output, weights), SD3, tmp_path / weights, mesh)
        exported = SD3Transformer2DModel.from_pretrained(tmp_path / weights / "transformer").state_dict()
        assert torch.equal(exported["pos_embed.pos_embed"][0], table.float())
        assert torch.equal(exported["context_embedder.weight"].bfloat16(), loaded.text_embed.weight)


def test_apt_starts_from_a_checkpoint_with_a_table(mesh, datasets, tmp_path):
    flow = pictures(datasets, tmp_path / "flow")
    train(flow, mesh)
    run = pictures(datasets, tmp_path / "apt", "apt")
    run = replace(
        run,
        apt=replace(run.apt, head_layers=(0.5, 1.0)),
        init=replace(run.init, generator=flow.output, diffusion=flow.output),
    )
    train(run, mesh)
    networks = Trainer(run, mesh).networks
    tables = (
        networks["generator"].module.position_table,
        networks["discriminator"].module.backbone.position_table,
    )
    assert torch.equal(*tables)
    assert not any(table.requires_grad for table in tables)


def test_data_without_pooled_text_of_the_right_width_is_refused(mesh, datasets, tmp_path):
    run = pictures(datasets, tmp_path / "run")
    model = replace(run.model, pooled_width=12)
    with pytest.raises(ValueError, match=r"the mean of the text, 8 wide, this model reads 12"):
        Batches(run.data, model, mesh, 0, 8, 4)
