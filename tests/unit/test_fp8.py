"""What FP8 needs apart from the chip: configuration, padding, and the scales of two
networks. The products themselves have not been run.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from megatron_apt.checkpoint import store
from megatron_apt.config import ParallelConfig, check_fits
from megatron_apt.models import fp8
from megatron_apt.models.config import Fp8Config
from megatron_apt.models.fp8 import Fp8Blocks, Fp8State
from megatron_apt.models.layout import build_layout
from megatron_apt.training.train import Trainer
from support.problems import build, model_config, run_config
from support.runs import config


def fp8_run(recipe="current", row_multiple=16, tp=1, sequence_parallel=False, **model):
    changes = {"dtype": "bfloat16", "width": 64, "heads": 4, "depth": 4} | model
    parallel = ParallelConfig(row_multiple=row_multiple, tp=tp, sequence_parallel=sequence_parallel)
    return run_config("apt", model_config(fp8=Fp8Config(recipe=recipe), **changes), parallel=parallel)


def test_a_sound_configuration_passes():
    check_fits(fp8_run())
    check_fits(fp8_run("mxfp8", row_multiple=32))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: fp8_run(dtype="float32"), r'model\.dtype=\'float32\' must be "bfloat16"'),
        (lambda: fp8_run(row_multiple=1), r"parallel\.row_multiple=1 to be a multiple of 16"),
        (lambda: fp8_run("mxfp8"), r"parallel\.row_multiple=16 to be a multiple of 32"),
        (
            lambda: fp8_run("blockwise", tp=2, sequence_parallel=True),
            r"parallel\.row_multiple=16 to be a multiple of 128",
        ),
        (lambda: fp8_run(width=72), r"model\.width=72 to be a multiple of 16"),
        (lambda: fp8_run(depth=2), r"bf16_first=1 \+ bf16_last=1 leave none of 2 blocks"),
    ],
)
def test_what_does_not_fit_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        check_fits(config())


@pytest.mark.parametrize("field", ["bf16_first", "bf16_last", "margin"])
def test_negative_fields_are_named(field):
    with pytest.raises(ValueError, match=rf"model\.fp8\.{field}=-1"):
        Fp8Config(**{field: -1})


def test_without_a_gpu_there_is_one_message(mesh):
    if mesh.device.type == "cuda":
        pytest.skip("there is a GPU")
    with pytest.raises(
        ValueError,
        match=r"model\.fp8\.recipe='delayed' needs a CUDA GPU with FP8.*use model\.fp8\.recipe=\"none\"",
    ):
        build(fp8_run("delayed"), mesh)


@pytest.mark.dist
def test_rows_come_in_multiples(ranks):
    for shapes in (((1, 2, 2),) * 3, ((1, 2, 2), (1, 3, 5))):
        for rows in ranks(2).run(padded_rows, ParallelConfig(tp=2, row_multiple=16), shapes):
            assert rows and all(count % 16 == 0 for count in rows)


def padded_rows(mesh, grids):
    layout = build_layout(grids, (3,) * len(grids), mesh)
    return [a * b for a, b, _ in (stream.folded(8, 2) for stream in (layout.visual, layout.text))]


class Linear(torch.nn.Module):
    """What a layer of Transformer Engine shows of its delayed scaling."""

    def __init__(self, history: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self._fp8_workspaces = {"weight": torch.zeros(1)}
        recipe = SimpleNamespace(margin=1)
        self.fp8_meta = {
            key: SimpleNamespace(scale=torch.ones(n), amax_history=torch.zeros(history, n), recipe=recipe)
            for key, n in (("scaling_fwd", 3), ("scaling_bwd", 2))
        }

    def init_fp8_metadata(self, num_gemms: int) -> None:
        pass


class Network(torch.nn.Module):
    def __init__(self, history: int = 3):
        super().__init__()
        self.fp8 = Fp8Blocks(Fp8Config(), 4, torch.device("cpu"))
        self.fp8.name, self.fp8.recipe, self.fp8.config = (
            "delayed",
            object(),
            Fp8Config("delayed", history=history),
        )
        self.fp8.products = lambda block: torch.no_grad()
        self.blocks = torch.nn.ModuleDict(
            {str(i): torch.nn.ModuleDict({"fc": Linear(history)}) for i in range(4)}
        )


def test_scales_follow_the_largest_value_of_recent_updates(mesh):
    network = Network()
    state = Fp8State(network, mesh, trains=True)
    assert list(state.layers) == ["blocks.1.fc", "blocks.2.fc"]  # the first and the last block stay in bf16
    layer = state.layers["blocks.1.fc"]
    forward, backward = layer.fp8_meta["scaling_fwd"], layer.fp8_meta["scaling_bwd"]
    assert (backward.scale == 2.0**20).all()
    seen = []
    for maxima in (
        [2.0, 0.5, 0.0],
        [1.0, 4.0, 0.0],
        [0.25, 0.125, 0.0],
        [0.5, 0.125, 0.0],
        [1.0, float("inf"), 0.0],
    ):
        forward.amax_history[0] = torch.tensor(maxima)
        state.step()
        seen.append(forward.scale.tolist())
        assert (forward.amax_history[0] == 0).all() and not layer._fp8_workspaces
    largest = [[2, 0.5], [2, 4], [2, 4], [1, 4]]  # of three updates
    assert [s[:2] for s in seen[:4]] == [[448 / a / 2, 448 / b / 2] for a, b in largest]
    assert seen[4][:2] == [448 / 1 / 2, 448 / 4 / 2]  # an infinity is no measure: the scale stays
    assert all(s[2] == 1.0 for s in seen)  # nothing was measured
    assert set(state.tensors()) == {
        f"fp8.blocks.{i}.fc.{way}.{what}"
        for i in (1, 2)
        for way in ("forward", "backward")
        for what in ("scale", "maxima")
    }


def test_the_first_weights_need_no_measuring(mesh):
    network = Network()
    state = Fp8State(network, mesh, trains=True)
    with torch.no_grad():
        network.blocks["1"]["fc"].weight.fill_(-0.25)
    state.start()
    first, second = (layer.fp8_meta["scaling_fwd"].scale.tolist() for layer in state.layers.values())
    assert first == [1.0, 448 / 0.25 / 2, 1.0]
    assert second == [1.0, 1.0, 1.0]  # all zero: nothing to measure


def test_passes_outside_updates_run_without_fp8():
    network = Network()
    del network.fp8.products
    with fp8.without(network):
        assert isinstance(network.fp8.products(1), contextlib.nullcontext)
    assert not network.fp8.off


def test_a_networks_step_leaves_the_others_scales(mesh):
    g, d = Network(), Network()
    states = [Fp8State(network, mesh, trains=True) for network in (g, d)]
    for network in (g, d):
        for block in network.blocks.values():
            block["fc"].fp8_meta["scaling_fwd"].amax_history[0] = 7.0
    states[0].step()
    assert g.blocks["1"]["fc"].fp8_meta["scaling_fwd"].scale[0] == 32.0
    untouched = d.blocks["1"]["fc"]
    assert (
        untouched.fp8_meta["scaling_fwd"].scale[0] == 1.0
        and untouched.fp8_meta["scaling_fwd"].amax_history[0, 0] == 7.0
    )
    assert untouched._fp8_workspaces


@pytest.mark.dist
def test_all_ranks_of_a_stage_agree_on_a_scale(ranks):
    for scales in ranks(2).run(scale_after_unequal_maxima, ParallelConfig()):
        assert scales == pytest.approx([224.0 / 3, 1.0, 1.0], rel=1e-6)


def scale_after_unequal_maxima(mesh):
    network = Network()
    state = Fp8State(network, mesh, trains=True)
    network.blocks["1"]["fc"].fp8_meta["scaling_fwd"].amax_history[0, 0] = 2.0 + mesh.world.rank
    state.step()
    return network.blocks["1"]["fc"].fp8_meta["scaling_fwd"].scale.tolist()


def test_scales_are_kept_in_checkpoints(mesh, datasets, tmp_path):
    """A stand-in's tensors go through a real checkpoint; a run that has none in it says so."""
    run = config(datasets, tmp_path / "run")
    values = {
        "fp8.blocks.1.fc.forward.scale": torch.rand(3),
        "fp8.blocks.1.fc.forward.maxima": torch.rand(4, 3),
    }
    trainer = Trainer(run, mesh)
    trainer.networks["generator"].fp8 = SimpleNamespace(tensors=lambda: values, step=lambda: None)
    trainer.step()
    trainer.save()
    folder = trainer.checkpoints.commit()
    fresh = Trainer(run, mesh).networks["generator"]
    restored = {name: torch.zeros_like(value) for name, value in values.items()}
    fresh.fp8 = SimpleNamespace(tensors=lambda: restored, step=lambda: None)
    fresh.restore(folder, updates=1, source="")
    assert all(torch.equal(restored[name], value) for name, value in values.items())
    fresh.fp8 = SimpleNamespace(
        tensors=lambda: {"fp8.blocks.2.fc.forward.scale": torch.zeros(3)}, step=lambda: None
    )
    with pytest.raises(
        store.CheckpointError, match=r"has no tensor 'generator\.fp8\.blocks\.2\.fc\.forward\.scale'"
    ):
        fresh.restore(folder, updates=1, source="")
