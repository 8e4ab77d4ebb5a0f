"""What stops a run: signals, lost ranks, errors on one rank. Real processes, real signals."""

import itertools
import os
import signal

import pytest
import torch

from megatron_apt.checkpoint import store
from megatron_apt.config import GuardConfig, ParallelConfig
from megatron_apt.errors import BadGradient, BadLoss
from megatron_apt.parallel.watch import LOST
from megatron_apt.schedule import execute
from megatron_apt.training.guards import Stopped
from megatron_apt.training.train import Trainer, train
from support.processes import ends, start
from support.runs import config


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 42), (signal.SIGUSR1, 42), (signal.SIGINT, 130)]
)
def test_a_signal_ends_training_with_a_checkpoint(mesh, datasets, tmp_path, number, code, capsys):
    run = config(datasets, tmp_path / "run", "flow", iterations=50, guards=GuardConfig(requeue_code=42))

    def send(iteration, values):
        if iteration == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        train(run, mesh, send)
    assert stopped.value.code == code
    assert store.latest(run.output).name == "iteration-00000003"
    assert f"saved at iteration 3 of 50 and stopped by {number.name}" in capsys.readouterr().out
    assert signal.getsignal(number) == before


def signalled(mesh, run):
    def send(iteration, values):  # called on the main rank only
        if iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        train(run, mesh, send)
    except Stopped as stopped:
        return stopped.code, store.latest(run.output).name


@pytest.mark.dist
def test_a_signal_to_one_rank_ends_all_at_the_same_iteration(ranks, datasets, tmp_path):
    run = config(datasets, tmp_path / "run", iterations=50)
    assert ranks(2).run(signalled, ParallelConfig(), run) == [(99, "iteration-00000002")] * 2


def bad_gradient(mesh, run):
    trainer = Trainer(run, mesh)
    weight = trainer.networks["generator"].module.x_embed.weight
    if mesh.world.rank == 1:
        calls = itertools.count()
        # Of two microbatches the second
        weight.register_hook(lambda g: g * float("nan") if next(calls) % 2 else g)
    before = trainer.networks["generator"].shards.master.clone()
    try:
        trainer.step()
    except BadGradient as error:
        assert torch.equal(trainer.networks["generator"].shards.master, before)
        return str(error)


@pytest.mark.dist
@pytest.mark.parametrize(
    "parallel", [ParallelConfig(), ParallelConfig(tp=2), ParallelConfig(cp=2)], ids=["dp2", "tp2", "cp2"]
)
def test_a_bad_gradient_of_another_rank_is_located(ranks, datasets, tmp_path, parallel):
    run = config(
        datasets, tmp_path / "run", micro_batch=4 // (3 - parallel.tp * parallel.cp), parallel=parallel
    )
    messages = ranks(2).run(bad_gradient, parallel, run)
    assert messages[0] == messages[1]
    assert (
        "generator.x_embed.weight" in messages[0]
        and "phase g, microbatch 1 on rank 1; its samples:" in messages[0]
    )


def bad_loss(mesh, run):
    loss = execute._Run._loss

    def spoiled(self, task, chain):
        if mesh.world.rank == 1 and chain.batch.iteration == 3:
            # The loss is not finite, its own gradient is
            chain.outputs[task.segment].data.fill_(-float("inf"))
        loss(self, task, chain)

    execute._Run._loss = spoiled
    try:
        train(run, mesh)
    except BadLoss as error:
        return str(error), store.latest(run.output).name
    finally:
        execute._Run._loss = loss


@pytest.mark.dist
def test_a_bad_loss_of_one_rank_stops_all_and_no_save_is_lost(ranks, datasets, tmp_path):
    run = config(datasets, tmp_path / "run", iterations=5, save_every=3, micro_batch=2)
    (message, latest), other = ranks(2).run(bad_loss, ParallelConfig(), run)
    assert (message, latest) == other
    assert "loss of phase g, branch fake, microbatch 0 on rank 1 is" in message and "samples:" in message
    assert latest == "iteration-00000003"


# --- ranks that die: processes of their own, because they do


DEATHS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "frozen": "os.kill(os.getpid(), signal.SIGSTOP)",  # its connections stay open: only the watch can tell
}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("death", "victim"),
    [
        ("killed", 1),
        ("frozen", 0),
        pytest.param("killed", 0, marks=pytest.mark.slow),
        pytest.param("frozen", 1, marks=pytest.mark.slow),
    ],
)
def test_the_others_stop_and_name_the_rank_that_is_lost(datasets, tmp_path, death, victim):
    processes = start(
        tmp_path,
        datasets,
        f"if mesh.world.rank == {victim}:\n    at_iteration_3(lambda: {DEATHS[death]})\ntrain(run, mesh)\n",
    )
    other = processes[1 - victim]
    (said,) = ends([other], within=120)
    processes[victim].kill()
    processes[victim].communicate()
    assert other.returncode == LOST, said
    assert f"rank {victim}" in said and ("died" in said or "no sign of life" in said)
    assert "Traceback" not in said and said.count("; stopping") == 1
    assert store.latest(tmp_path / "run").name == "iteration-00000002"


@pytest.mark.dist
def test_an_error_on_one_rank_reaches_the_others(datasets, tmp_path):
    script = (
        "def fail():\n    raise ValueError('bad luck on this rank')\nif mesh.world.rank == 1:\n    "
        "at_iteration_3(fail)\ntrain(run, mesh)\n"
    )
    said = ends(start(tmp_path, datasets, script), within=120)
    assert "rank 1" in said[0] and "ValueError: bad luck on this rank" in said[0]


def test_the_guards_check_themselves():
    with pytest.raises(ValueError, match=r"guards\.rank_timeout=-1"):
        GuardConfig(rank_timeout=-1)
    with pytest.raises(ValueError, match=r"guards\.requeue_code=300"):
        GuardConfig(requeue_code=300)
