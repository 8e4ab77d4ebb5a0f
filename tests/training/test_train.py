"""Training end to end on a few real digits: resume, stages, accumulation, ranks, guards."""

import json
from dataclasses import replace

import pytest
import torch

from megatron_apt.checkpoint import store
from megatron_apt.config import (
    DataConfig,
    GuardConfig,
    InitConfig,
    ParallelConfig,
    RetentionConfig,
)
from megatron_apt.data.batches import Batches, deal
from megatron_apt.errors import BadGradient, BadLoss, Collapse
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.models.discriminator import Discriminator
from megatron_apt.training.train import Trainer, train
from support.planted import committed_again
from support.problems import model_config
from support.runs import SMOOTH, config, rows, state

METHODS = ["flow", "consistency", "apt"]


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(mesh, datasets, tmp_path, method):
    straight = config(datasets, tmp_path / "straight", method)
    train(straight, mesh)
    broken = config(datasets, tmp_path / "broken", method, save_every=3)

    def stop_at_5(iteration, values):
        if iteration == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, mesh, stop_at_5)
    train(broken, mesh)
    assert rows(tmp_path / "broken") == rows(tmp_path / "straight")
    a, b = state(Trainer(straight, mesh)), state(Trainer(broken, mesh))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(".ema." in key for key in a) and any(".optimizer.square." in key for key in a)


def test_stages_start_from_each_other(mesh, datasets, tmp_path):
    flow = config(datasets, tmp_path / "flow", "flow", iterations=2)
    train(flow, mesh)
    distilled = config(
        datasets, tmp_path / "distilled", "consistency", iterations=2, init=InitConfig(diffusion=flow.output)
    )
    train(distilled, mesh)
    apt = config(
        datasets,
        tmp_path / "apt",
        init=InitConfig(generator=f"{distilled.output}:raw", diffusion=flow.output),
    )
    trainer = Trainer(apt, mesh)
    got = state(trainer)
    stored = {
        key: t.data
        for n in Trainer(distilled, mesh).networks.values()
        for key, t in n.sharded_state().items()
    }
    diffusion = {
        key: t.data for n in Trainer(flow, mesh).networks.values() for key, t in n.sharded_state().items()
    }
    for key, value in got.items():
        if key.startswith("generator.") and "ema" not in key and "optimizer" not in key:
            assert torch.equal(value, stored[key]), key
        if key.startswith("discriminator.backbone."):
            assert torch.equal(
                value, diffusion["generator.ema." + key.removeprefix("discriminator.backbone.")]
            ), key


def test_the_ablation_takes_the_distilled_weights(mesh, datasets, tmp_path):
    flow = config(datasets, tmp_path / "flow", "flow", iterations=1)
    train(flow, mesh)
    distilled = config(
        datasets, tmp_path / "distilled", "consistency", iterations=2, init=InitConfig(diffusion=flow.output)
    )
    train(distilled, mesh)
    init = InitConfig(generator=distilled.output, diffusion=flow.output)
    networks = Trainer(
        config(datasets, tmp_path / "apt", apt=AptConfig(discriminator_init="distilled"), init=init), mesh
    ).networks
    ours, generator = (
        dict(networks["discriminator"].module.backbone.named_parameters()),
        dict(networks["generator"].module.named_parameters()),
    )
    assert all(torch.equal(p, generator[name]) for name, p in ours.items())


ABLATIONS = {
    "aR1 off": AptConfig(ar1_lambda=0.0),
    "last-layer head": AptConfig(head_layers=(1.0,)),
    "two thirds of the depth": AptConfig(discriminator_depth=2 / 3, head_layers=(0.5, 1.0)),
    "a third of the depth": AptConfig(discriminator_depth=1 / 3, head_layers=(1.0,)),
    "frozen backbone": AptConfig(train_backbone=False),
    "t fixed": AptConfig(timestep_fixed=0.5),
    "hinge": AptConfig(loss="hinge"),
    "relativistic": AptConfig(loss="relativistic", ar2_lambda=1.0),
    "aR2": AptConfig(ar2_lambda=5.0),
    "unmatched conditions": AptConfig(unmatched_conditions=True),
    "faster heads": AptConfig(head_lr_scale=5.0, discriminator_lr=1e-4),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_is_a_config_change(mesh, datasets, tmp_path, name):
    trainer = Trainer(config(datasets, tmp_path, apt=ABLATIONS[name]), mesh)
    before = state(trainer)
    # Logits start at zero: the first update moves only their layer, the second the heads
    # and all before them
    for _ in range(3):
        values = trainer.step()
    after = state(trainer)
    assert all(v == v for v in values.values())
    assert ("d/ar1" in values) == (name != "aR1 off")
    assert ("d/ar2" in values) == (name in ("aR2", "relativistic"))
    assert ("d/loss_unmatched" in values) == (name == "unmatched conditions")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert any(key.startswith("generator.") for key in moved)
    assert any(key.startswith("discriminator.heads") for key in moved)
    assert any(key.startswith("discriminator.backbone.blocks") for key in moved) == (
        name != "frozen backbone"
    )
    blocks = {key.split(".")[3] for key in before if key.startswith("discriminator.backbone.blocks.")}
    assert len(blocks) == {"two thirds of the depth": 2, "a third of the depth": 1}.get(name, 3)


def ablated(mesh, run):
    trainer = Trainer(run, mesh)
    values = [trainer.step() for _ in range(3)]
    return values, dict(
        trainer.networks["discriminator"].shards.whole(trainer.networks["discriminator"].shards.master)
    )


@pytest.mark.dist
@pytest.mark.parametrize(
    "name",
    [
        "last-layer head",
        "frozen backbone",
        "text to the end",
        pytest.param("two thirds of the depth", marks=pytest.mark.slow),
        pytest.param("relativistic", marks=pytest.mark.slow),
        pytest.param("early heads", marks=pytest.mark.slow),
    ],
)
def test_ablations_on_two_ranks_equal_one(ranks, mesh, datasets, tmp_path, name):
    """Some leave parameters without any gradient, which must not upset the reduction of the others."""
    extra = {"early heads": AptConfig(head_layers=(0.34, 0.67)), "text to the end": AptConfig()}
    model = model_config(dtype="float64", latent_channels=4, last_block_text=name == "text to the end")
    run = config(
        datasets,
        tmp_path / "run",
        apt=(ABLATIONS | extra)[name],
        model=model,
        optimizer=SMOOTH,
        micro_batch=2,
    )
    values, weights = ablated(mesh, run)
    for got, found in ranks(2).run(
        ablated, ParallelConfig(), replace(run, optimizer=replace(SMOOTH, bucket_size=10_000))
    ):
        for ours, want in zip(got, values, strict=True):
            assert all(
                ours[k] == pytest.approx(v, rel=1e-8, abs=1e-10)
                for k, v in want.items()
                if k != "sample/diversity"
            )
        assert all(torch.allclose(found[key], weights[key], rtol=1e-8, atol=1e-10) for key in weights)


def test_microbatches_add_up_to_the_global_batch(mesh, datasets, tmp_path):
    smooth = {"model": model_config(dtype="float64", latent_channels=4), "optimizer": SMOOTH}
    whole = Trainer(config(datasets, tmp_path / "a", micro_batch=8, **smooth), mesh)
    parts = Trainer(config(datasets, tmp_path / "b", micro_batch=2, **smooth), mesh)
    for _ in range(2):
        a, b = whole.step(), parts.step()
        skipped = {"sample/diversity"}  # its pairs are neighbours within a microbatch
        assert all(b[k] == pytest.approx(v, rel=1e-9, abs=1e-12) for k, v in a.items() if k not in skipped)
    a, b = state(whole), state(parts)
    for key in a:
        assert torch.allclose(a[key], b[key], rtol=1e-9, atol=1e-12), key


def steps(mesh, run, count):
    trainer = Trainer(run, mesh)
    values = [trainer.step() for _ in range(count)]
    return values, {
        name: network.module.state_dict() for name, network in trainer.networks.items()
    } if mesh.tp.size == 1 else None


@pytest.mark.dist
@pytest.mark.parametrize(
    "parallel", [ParallelConfig(), ParallelConfig(tp=2), ParallelConfig(cp=2)], ids=["dp2", "tp2", "cp2"]
)
def test_two_ranks_train_like_one(ranks, mesh, datasets, tmp_path, parallel):
    run = config(
        datasets,
        tmp_path / "run",
        model=model_config(dtype="float64", latent_channels=4),
        optimizer=SMOOTH,
        parallel=parallel,
    )
    reference, weights = steps(mesh, replace(run, parallel=ParallelConfig()), 3)
    for values, got in ranks(2).run(steps, parallel, run, 3):
        for ours, want in zip(values, reference, strict=True):
            assert all(
                ours[k] == pytest.approx(v, rel=1e-8, abs=1e-10)
                for k, v in want.items()
                if "grad_norm" not in k
            )
        for name in got or ():
            for key, value in got[name].items():
                assert value is None or torch.allclose(value, weights[name][key], rtol=1e-8, atol=1e-10), key


@pytest.mark.dist
def test_ranks_with_different_kinds_of_microbatches_agree(ranks, mesh, datasets, tmp_path):
    """Blocks of 2 in microbatches of 4: some are packed mixtures, some are uniform, and
    the two ranks hold different ones.
    """
    run = config(
        datasets, tmp_path / "run", model=model_config(dtype="float64", latent_channels=4), optimizer=SMOOTH
    )
    run = replace(run, data=replace(run.data, block=2, weights=(3, 1)))
    reference, _ = steps(mesh, run, 3)
    for values, _ in ranks(2).run(steps, ParallelConfig(), run, 3):
        for ours, want in zip(values, reference, strict=True):
            assert ours == {k: pytest.approx(v, rel=1e-8, abs=1e-10) for k, v in want.items()}


@pytest.mark.dist
def test_a_checkpoint_of_two_ranks_continues_on_one(ranks, mesh, datasets, tmp_path):
    run = config(
        datasets,
        tmp_path / "run",
        model=model_config(dtype="float64", latent_channels=4),
        optimizer=SMOOTH,
        parallel=ParallelConfig(tp=2),
    )
    ranks(2).run(_train_to, ParallelConfig(tp=2), replace(run, iterations=3), timeout=120)
    train(replace(run, parallel=ParallelConfig()), mesh)
    straight = replace(run, output=str(tmp_path / "straight"), parallel=ParallelConfig())
    train(straight, mesh)
    for ours, want in zip(rows(run.output), rows(straight.output), strict=True):
        assert all(ours[k] == pytest.approx(v, rel=1e-8, abs=1e-10) for k, v in want.items())


def _train_to(mesh, run):
    train(run, mesh)


def test_exact_r1_is_reported_beside_its_estimate(mesh, datasets, tmp_path):
    trainer = Trainer(config(datasets, tmp_path, apt=AptConfig(ar1_sigma=1e-2, exact_r1_every=2)), mesh)
    with torch.no_grad():
        # It starts at zero, where both are zero
        trainer.networks["discriminator"].module.logit.weight.normal_()
    first, second = trainer.step(), trainer.step()
    # Chi-square of 8 samples around 1
    assert 0.1 < first["check/r1_approximate"] / first["check/r1_exact"] < 5.0
    assert "check/r1_exact" not in second


def test_exact_r1_asks_no_gradient_of_a_weight(mesh, datasets, tmp_path, monkeypatch):
    """Layers that add a weight's gradient to the update's themselves would spoil the update."""
    trainer = Trainer(config(datasets, tmp_path, apt=AptConfig(exact_r1_every=1)), mesh)
    seen, forward, measure = [], Discriminator.forward, trainer.method.measure

    def watched(networks, batch):
        def recorded(self, *inputs):
            seen.append(any(p.requires_grad for p in self.parameters()))
            return forward(self, *inputs)

        with monkeypatch.context() as patch:
            patch.setattr(Discriminator, "forward", recorded)
            return measure(networks, batch)

    trainer.method = replace(trainer.method, measure=watched)
    trainer.step()
    assert seen and not any(seen)


def test_the_summary_reports_the_correlation_of_exact_and_approximate_r1(mesh, datasets, tmp_path):
    run = config(datasets, tmp_path, apt=AptConfig(ar1_sigma=1e-2, exact_r1_every=1))
    train(run, mesh)
    summary = json.loads((tmp_path / "summary.json").read_text())
    logged = rows(tmp_path)
    exact, estimate = (
        torch.tensor([row[key] for row in logged], dtype=torch.float64)
        for key in ("check/r1_exact", "check/r1_approximate")
    )
    want = torch.corrcoef(torch.stack((exact, estimate)))[0, 1]
    assert summary["correlation"]["check/r1_exact ~ check/r1_approximate"] == pytest.approx(
        float(want), rel=1e-9
    )
    assert summary["last_tenth"]["d/loss"] == logged[-1]["d/loss"]


def test_nan_in_the_data_stops_training_and_keeps_the_checkpoint(mesh, datasets, tmp_path):
    run = config(datasets, tmp_path / "run", save_every=2)
    trainer = Trainer(replace(run, iterations=2), mesh)
    train(replace(run, iterations=2), mesh)
    trainer = Trainer(replace(run, iterations=2), mesh)
    with torch.no_grad():
        trainer.networks["discriminator"].module.logit.weight.fill_(float("nan"))
    with pytest.raises(
        BadLoss, match=r"phase g, branch fake, microbatch 0 on rank 0 is nan in iteration 3; its samples: \d+"
    ):
        trainer.step()
    assert store.latest(run.output).name == "iteration-00000002"


def test_a_bad_gradient_names_the_parameter(mesh, datasets, tmp_path):
    trainer = Trainer(config(datasets, tmp_path), mesh)
    network = trainer.networks["generator"]
    network.module.x_embed.weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(
        BadGradient,
        match=r"generator\.x_embed\.weight is not finite in phase g, microbatch 0 on rank 0; "
        r"its samples: \d+",
    ):
        trainer.step()


@pytest.mark.parametrize(
    ("batch", "micro", "ranks"), [(9062, 4, 8), (9062, 1, 128), (2048, 3, 6), (7, 2, 4), (10, 64, 3)]
)
def test_a_global_batch_is_dealt_out_to_the_last_sample(batch, micro, ranks):
    parts = [deal(batch, micro, ranks, rank) for rank in range(ranks)]
    dealt = sorted(i for part in parts for first, count in part for i in range(first, first + count))
    assert dealt == list(range(batch))
    counts = [sum(count for _, count in part) for part in parts]
    assert max(counts) - min(counts) <= 1
    assert all(1 <= count <= micro for part in parts for _, count in part)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_global_batch_that_cannot_be_dealt_is_refused(mesh, datasets, tmp_path):
    eight = replace(mesh, dp=replace(mesh.dp, size=8))
    run = config(datasets, tmp_path)
    with pytest.raises(
        ValueError, match="global_batch=7 leaves some of 8 data-parallel ranks without samples"
    ):
        Batches(run.data, run.model, eight, 0, 7, 2)
    with pytest.raises(
        ValueError,
        match=r"global_batch=9 in microbatches of micro_batch=4 .* leaves one of 1; "
        "this method needs 2 in each",
    ):
        Trainer(replace(run, global_batch=9, apt=AptConfig(unmatched_conditions=True)), mesh)


def test_lasting_collapse_stops_training_with_what_it_saw(mesh, datasets, tmp_path):
    guards = GuardConfig(collapse_window=3, collapse_d_loss=100.0)
    with pytest.raises(
        Collapse, match=r"iteration 4, lasting since 1: d/loss .* < guards.collapse_d_loss 100"
    ):
        train(config(datasets, tmp_path, guards=guards, iterations=9), mesh)


def test_another_configuration_does_not_continue_a_run(mesh, datasets, tmp_path):
    run = config(datasets, tmp_path, iterations=1)
    train(run, mesh)
    with pytest.raises(store.CheckpointError, match=r"seed: 0 in the checkpoint, 1 asked for\."):
        Trainer(replace(run, seed=1), mesh)
    with pytest.raises(
        store.CheckpointError, match=r"otherwise: optimizer\.lr: 0\.\S+ in the checkpoint, 1\.0 asked for\."
    ):
        Trainer(replace(run, optimizer=replace(run.optimizer, lr=1.0)), mesh)
    # How it runs may change
    assert (
        Trainer(
            replace(run, optimizer=replace(run.optimizer, overlap=False, bucket_size=1000)), mesh
        ).iteration
        == 1
    )


def test_a_checkpoint_of_another_shape_is_refused(mesh, datasets, tmp_path):
    flow = config(datasets, tmp_path / "flow", "flow", iterations=1)
    train(flow, mesh)
    wider = config(
        datasets,
        tmp_path / "wide",
        "flow",
        model=model_config(width=64, latent_channels=4),
        init=InitConfig(generator=flow.output),
    )
    with pytest.raises(store.CheckpointError, match=r"has shape \(.*\), this model needs"):
        Trainer(wider, mesh)
    deeper = config(
        datasets,
        tmp_path / "deep",
        "flow",
        model=model_config(depth=4, latent_channels=4),
        init=InitConfig(generator=flow.output),
    )
    with pytest.raises(store.CheckpointError, match=r"has no tensor|has shape"):
        Trainer(deeper, mesh)
    with pytest.raises(store.CheckpointError, match="no checkpoint there"):
        Trainer(
            config(datasets, tmp_path / "x", "flow", init=InitConfig(generator=str(tmp_path / "nowhere"))),
            mesh,
        )


def test_old_checkpoints_are_removed_and_a_torn_save_is_ignored(mesh, datasets, tmp_path):
    run = config(
        datasets, tmp_path / "run", "flow", save_every=1, iterations=4, retention=RetentionConfig(last=2)
    )
    train(run, mesh)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.glob("iteration-*")) == ["iteration-00000003", "iteration-00000004"]
    torn = folder / ".iteration-00000005.tmp"
    torn.mkdir()
    (torn / "state.json").write_text("{")
    assert Trainer(run, mesh).iteration == 4
    (folder / "iteration-00000004" / "state.json").write_text("{")
    with pytest.raises(store.CheckpointError, match=r"iteration-00000004/state\.json"):
        Trainer(run, mesh)


class Attack:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_an_index_that_would_run_code_is_refused(mesh, datasets, tmp_path):
    import pickle

    run = config(datasets, tmp_path, "flow", iterations=1)
    train(run, mesh)
    index = store.latest(run.output) / ".metadata"
    index.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(store.CheckpointError, match=r"\.metadata: .* bytes, .* were committed"):
        Trainer(run, mesh)
    committed_again(index.parent)  # the attacker also writes the checksums
    with pytest.raises(store.CheckpointError, match=r"\.metadata: its index asks for builtins\.exec"):
        Trainer(run, mesh)
    index.write_bytes(index.read_bytes()[:10])
    (index.parent / "index.json").unlink()
    with pytest.raises(store.CheckpointError, match="the checkpoint is damaged"):
        store.load(index.parent, {})


def test_a_shorter_discriminator_starts_from_the_diffusion_weights(mesh, datasets, tmp_path):
    flow = config(datasets, tmp_path / "flow", "flow", iterations=1)
    train(flow, mesh)
    init = InitConfig(generator=flow.output, diffusion=flow.output)
    apt = AptConfig(discriminator_depth=2 / 3, head_layers=(0.5, 1.0))
    networks = Trainer(config(datasets, tmp_path / "apt", apt=apt, init=init), mesh).networks
    generator = dict(networks["generator"].module.named_parameters())
    backbone = dict(networks["discriminator"].module.backbone.named_parameters())
    assert {name.split(".")[1] for name in backbone if name.startswith("blocks.")} == {"0", "1"}
    assert all(torch.equal(p, generator[name]) for name, p in backbone.items())


def test_a_resumed_distillation_keeps_its_teacher(mesh, datasets, tmp_path):
    flow = config(datasets, tmp_path / "flow", "flow", iterations=1, retention=RetentionConfig(last=0))
    train(flow, mesh)
    run = config(
        datasets,
        tmp_path / "run",
        "consistency",
        iterations=2,
        save_every=1,
        init=InitConfig(diffusion=flow.output),
    )
    train(replace(run, iterations=1), mesh)
    teacher = Trainer(run, mesh).networks["teacher"].module.x_embed.weight.clone()
    train(replace(flow, iterations=3), mesh)  # the teacher's run goes on meanwhile
    assert torch.equal(Trainer(run, mesh).networks["teacher"].module.x_embed.weight, teacher)


def test_checkpoint_state_is_json(mesh, datasets, tmp_path):
    run = config(datasets, tmp_path, "flow", iterations=1)
    train(run, mesh)
    stored = json.loads((store.latest(run.output) / "state.json").read_text())
    assert stored["iteration"] == 1 and stored["samples_seen"] == 8
    assert stored["config"]["model"]["width"] == 48


def test_data_that_does_not_fit_the_model_is_refused(mesh, datasets, tmp_path):
    for model, message in (
        (model_config(latent_channels=16), r"latents have 4 channels, model\.latent_channels=16"),
        (model_config(text_width=9), r"text embeddings are 8 wide, model\.text_width=9"),
        (model_config(patch=(1, 3, 2)), "does not split into patches"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(config(datasets, tmp_path, model=model), mesh)
    with pytest.raises(ValueError, match=r"data\.shards=\(\)"):
        Trainer(config(datasets, tmp_path, data=DataConfig()), mesh)
