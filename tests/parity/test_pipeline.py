"""The executor on several pipeline stages: what it puts off and lets go, and what it says
when something fails (parity: test_parity_matrix.py).
"""

import gc
import json
import re
import weakref
from dataclasses import replace

import pytest
import torch

from megatron_apt.checkpoint import store
from megatron_apt.config import PipelineConfig
from megatron_apt.errors import BadGradient, BadLoss
from megatron_apt.schedule import execute
from megatron_apt.schedule.mail import Mail
from megatron_apt.schedule.prepare import Pipeline
from megatron_apt.training.train import Trainer, train
from support.parity import SCHEDULES, _samples, deep
from support.problems import build, model_config
from support.processes import ends, start
from support.runs import PP2, SMOOTH, config, deep_run, rows

pytestmark = pytest.mark.dist


# --- what is put off, and what is let go


def traced(mesh, run, schedule):
    """For each action of two iterations whether it left gradients in block weights of its
    role; how many activations were sent, the most messages kept at a time, and how many
    sent activations outlived the run.
    """
    run = replace(run, pipeline=SCHEDULES[schedule])
    method, networks, executor = build(run, mesh)
    program = Pipeline(run.pipeline, method, mesh).program(3, 2)
    written, kept, sent = [], [0], []
    compute, post = execute._Run.compute, Mail.post

    def traced_compute(self, action, at):
        segment = self._branches[action.task.phase, action.task.branch].segments[action.task.segment]
        weights = [
            p
            for name, p in networks[segment.role].module.named_parameters()
            if ".linear_fc1.weight" in name and "blocks" in name
        ]
        before = [p.main_grad.clone() for p in weights]
        compute(self, action, at)
        written.append(
            (
                action.kind,
                segment.grad,
                any(not torch.equal(p.main_grad, old) for p, old in zip(weights, before, strict=True)),
            )
        )

    def traced_post(self, action):
        post(self, action)
        if action.kind == "SEND" and action.task.kind == "F":
            sent.append(weakref.ref(self._sending[-1][1]))
        kept.append(len(self._sending))

    execute._Run.compute, Mail.post = traced_compute, traced_post
    try:
        parts = [(0, 2), (2, 2), (4, 2)]
        executor.run(
            program,
            lambda i: [_samples(mesh, run, "images", i, first, size) for first, size in parts],
            lambda task: networks[task.role].update(2),
        )
    finally:
        execute._Run.compute, Mail.post = compute, post
    gc.collect()
    alive = sum(reference() is not None for reference in sent)
    return written, len(sent), max(kept), alive


@pytest.mark.parametrize("schedule", ["interleaved", "1f1b"])
def test_weight_gradients_come_when_the_schedule_says(ranks, schedule):
    for written, sent, kept, alive in ranks(2).run(traced, PP2, deep(), schedule):
        kinds = {
            (kind, grad): {changed for k, g, changed in written if (k, g) == (kind, grad)}
            for kind, grad, _ in written
        }
        split = schedule == "interleaved"
        assert kinds["I", "full"] == {not split} and kinds["W", "full"] == {split}
        assert (
            kinds["F", "full"] == kinds["F", "none"] == kinds["F", "input"] == kinds["I", "input"] == {False}
        )
        assert ("W", "input") not in kinds
        assert sent > 10 and kept <= 8 and alive == 0


# --- training and its checkpoints


def trained(mesh, run):
    train(run, mesh)


def test_the_pipeline_drains_at_checkpoints_and_a_resume_is_bit_for_bit_the_same(ranks, datasets, tmp_path):
    straight = deep_run(
        datasets, tmp_path / "straight", iterations=6, save_every=3, pipeline=PipelineConfig(window=2)
    )
    ranks(2).run(trained, PP2, straight)
    broken = replace(straight, output=str(tmp_path / "broken"))
    ranks(2).run(trained, PP2, replace(broken, iterations=3))
    ranks(2).run(trained, PP2, broken)
    assert rows(straight.output) == rows(broken.output)
    folders = [store.latest(run.output) for run in (straight, broken)]
    assert [folder.name for folder in folders] == ["iteration-00000006"] * 2
    for (key, a), (other, b) in zip(*(store.read_tensors(folder) for folder in folders), strict=True):
        assert key == other and torch.equal(a, b), key


def several(mesh, run, count):
    return Trainer(run, mesh).run(count)


def test_data_parallel_ranks_with_different_numbers_of_microbatches(ranks, mesh, datasets, tmp_path):
    """Five samples in twos on two data-parallel ranks: two microbatches on one, one on
    the other, each with a schedule of its own.
    """
    model = model_config(dtype="float64", latent_channels=4, depth=4)
    run = config(datasets, tmp_path / "run", model=model, optimizer=SMOOTH, global_batch=5, micro_batch=2)
    trainer = Trainer(run, mesh)
    want = [trainer.step() for _ in range(3)]
    for found in ranks(4).run(several, PP2, replace(run, parallel=PP2), 3):
        for ours, reference in zip(found, want, strict=True):
            # Its pairs are neighbours within a microbatch
            shared = {key: value for key, value in reference.items() if key != "sample/diversity"}
            assert all(
                ours[key] == pytest.approx(value, rel=1e-8, abs=1e-10) for key, value in shared.items()
            )


def stopped(mesh, run, where):
    """The error of a run in which something is not finite on the second rank."""
    loss = execute._Run._loss
    trainer_step = Trainer.run

    def spoiled_loss(self, task, chain):
        if chain.batch.iteration == 1:
            chain.outputs[task.segment].data.fill_(float("inf"))
        loss(self, task, chain)

    def spoiled_run(self, count):
        weights = dict(self.networks["discriminator"].module.named_parameters())
        name = "backbone.blocks.3.visual.linear_fc1.bias"
        if name in weights:
            weights[name].register_hook(lambda grad: grad * float("nan"))
        return trainer_step(self, count)

    if where == "loss":
        execute._Run._loss = spoiled_loss
    else:
        Trainer.run = spoiled_run
    try:
        train(run, mesh)
    except (BadLoss, BadGradient) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        execute._Run._loss, Trainer.run = loss, trainer_step


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("loss", r"BadLoss: loss of phase ., branch \w+, microbatch 0 on rank 1 is .*; its samples: "),
        (
            "gradient",
            r"BadGradient: the gradient of discriminator\.backbone\.blocks\.3\.visual\.linear_fc1\.bias "
            ".*is not finite in phase d on rank 1",
        ),
    ],
)
def test_what_is_not_finite_stops_every_stage(ranks, datasets, tmp_path, where, message):
    run = deep_run(datasets, tmp_path / "run", iterations=4, pipeline=PipelineConfig(chunks=1))
    messages = ranks(2).run(stopped, PP2, run, where)
    assert messages[0] == messages[1] and re.match(message, messages[0])


# --- failures


def test_an_error_ends_all_ranks_and_names_rank_and_action(datasets, tmp_path):
    script = """
from dataclasses import replace
from megatron_apt.schedule import execute
from megatron_apt.schedule.mail import Mail
from support.runs import deep_run

run = replace(deep_run(Path(sys.argv[1]), sys.argv[2], iterations=3), guards=GuardConfig(rank_timeout=6.0))
compute = execute._Run.compute
def failing(self, action, at):
    if str(action) == "I discriminator.2 i1 d/real.0 m1":
        raise MemoryError("no memory left")
    compute(self, action, at)
execute._Run.compute = failing
train(run, mesh)
"""
    outputs = ends(start(tmp_path, datasets, script, parallel=PP2), within=90)
    assert re.search(
        r"rank 0: rank 1 .* stopped: out of memory: no memory left; "
        r".* in action I discriminator\.2 i1 d/real\.0 m1 on",
        outputs[0],
    )
    assert "in action I discriminator.2 i1 d/real.0 m1 on rank 1" in outputs[1]


def test_ranks_with_different_schedules_are_refused(ranks, datasets, tmp_path):
    found = ranks(2).run(differing, PP2, deep_run(datasets, tmp_path / "run"))
    assert all("pipeline ranks made different schedules" in message for message in found)


def differing(mesh, run):
    run = replace(run, pipeline=PipelineConfig(forward=1.0 + mesh.pp.rank))
    try:
        Trainer(run, mesh).run(1)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pipeline": PipelineConfig(chunks=2)},
            "the generator has 3 blocks, which do not make 4 pipeline stages (parallel.pp=2, 2 on each); use "
            "a smaller parallel.pp or",
        ),
        ({"pipeline": PipelineConfig(cap=1.0)}, "pipeline.cap=1: "),
    ],
)
def test_what_does_not_fit_is_said(ranks, datasets, tmp_path, change, message):
    run = config(datasets, tmp_path / "run", parallel=PP2, **change)
    assert all(message in found for found in ranks(2).run(refused, PP2, run))


def refused(mesh, run):
    try:
        Trainer(run, mesh).run(1)
    except ValueError as error:
        return str(error)


def test_exact_r1_needs_the_whole_discriminator(mesh, datasets, tmp_path):
    run = config(datasets, tmp_path / "run", parallel=PP2)
    with pytest.raises(
        ValueError, match=r"apt\.exact_r1_every=2 needs the whole discriminator on a rank; use parallel\.pp=1"
    ):
        Trainer(replace(run, apt=replace(run.apt, exact_r1_every=2)), mesh)


def test_the_configuration_of_a_pipeline_checks_itself():
    for field, value in {"window": 0, "forward": 0.0, "cap": -1.0, "message": -0.1}.items():
        with pytest.raises(ValueError, match=rf"pipeline\.{field}={json.dumps(value)}"):
            PipelineConfig(**{field: value})
