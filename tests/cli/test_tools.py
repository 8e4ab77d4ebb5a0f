"""The command-line tools and the figures they print, against what really happens."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_apt.checkpoint import store
from megatron_apt.cli import main
from megatron_apt.config import OptimizerConfig, ParallelConfig
from megatron_apt.models.discriminator import QueryHead
from megatron_apt.models.layout import build_layout
from megatron_apt.models.spec import choose_backend
from megatron_apt.parallel.traffic import Traffic
from megatron_apt.plan.memory import PlanConfig, memory, plan
from megatron_apt.training.train import train
from support.problems import build, microbatch, model_config, run_config
from support.runs import config

TOOLS = Path(__file__).parents[2] / "tools"
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="measures there what it is meant for")


def tool(*arguments, timeout=900) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


# --- memory


def held(mesh, run) -> dict[str, dict[str, int]]:
    """Bytes that the networks of a run really hold on this rank, padding included."""
    _, networks, _ = build(run, mesh)
    found = {}
    for name, network in networks.items():
        buffers = network.shards.ddp.buffers
        found[name] = {
            "weights": sum(b.param_data.nbytes for b in buffers),
            "gradients": sum(b.grad_data.nbytes for b in buffers),
            "masters": network.shards.master.nbytes,
            **{f"state {key}": value.nbytes for key, value in network.optimizer.state.items()},
        }
        if network.ema:
            found[name]["average"] = network.ema.average.nbytes
    return found


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["rmsprop", "adamw"])
@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(), ParallelConfig(tp=2), ParallelConfig(cp=2), ParallelConfig(pp=2)],
    ids=["dp2", "tp2", "cp2", "pp2"],
)
def test_the_plan_counts_what_is_held(ranks, parallel, kind):
    run = run_config(model=model_config(dtype="bfloat16"), parallel=parallel)
    run = replace(run, optimizer=OptimizerConfig(kind=kind, ema=0.9))
    planned = {role.role: role for role in memory(run, ranks=2)}
    everyone = ranks(2).run(held, parallel, run)
    # Of unequal stages the largest is planned for
    most = max(everyone, key=lambda real: sum(sum(parts.values()) for parts in real.values()))
    for name, parts in most.items():
        assert parts.keys() == planned[name].parts.keys()
        for part, size in parts.items():
            # Megatron-Core starts every parameter at a multiple of 64 numbers, a bucket at one of 128.
            assert 1.0 <= size / planned[name].parts[part] < 1.25, (name, part)


def test_a_frozen_backbone_is_planned_as_frozen(mesh):
    run = run_config(model=model_config(dtype="bfloat16"))
    whole, heads = (
        memory(replace(run, apt=replace(run.apt, train_backbone=trains)), 2)[1] for trains in (True, False)
    )
    assert heads.parts["weights"] == whole.parts["weights"]
    assert 0 < heads.weights < whole.weights / 2 and heads.parts["gradients"] < whole.parts["gradients"] / 2


def test_one_state_saves_a_third_of_what_adam_shards(mesh, tmp_path, capsys):
    run = run_config(model=model_config(dtype="bfloat16"))
    ours, adam = memory(run, 8), memory(run, 8, optimizer="adamw")
    for a, b in zip(ours, adam, strict=True):
        assert b.total - a.total == 4 * a.shard
    plan(run, PlanConfig(ranks=8, json=str(tmp_path / "plan.json")))
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["bytes_with_adam"] - figures["bytes"] == 4 * sum(role.shard for role in ours)
    assert "1 state" in capsys.readouterr().out
    with pytest.raises(ValueError, match="ranks=3 is not a multiple of tp x cp x pp = 2"):
        memory(replace(run, parallel=ParallelConfig(tp=2)), 3)


# --- communicated bytes


def head_traffic(mesh, samples: int):
    model = model_config()
    head = QueryHead(model, mesh, choose_backend("cpu", "float32"))
    layout = build_layout(((2, 4, 4),) * samples, (3,) * samples, mesh)
    x = torch.randn(samples, 32 // mesh.cp.size, model.width, requires_grad=True)
    with Traffic(mesh) as traffic:
        y = head(x, layout)
    forward = dict(traffic.payload), dict(traffic.calls)
    with Traffic(mesh) as traffic:
        y.sum().backward()
    return forward, dict(traffic.payload)


@pytest.mark.dist
def test_a_query_head_communicates_three_small_tensors(ranks):
    """max (n, H), sum (n, H) and accumulator (n, H, K): nothing that grows with the tokens."""
    model, samples = model_config(), 5
    for (payload, calls), backward in ranks(2).run(head_traffic, ParallelConfig(cp=2), samples):
        assert payload == {("cp", "all_reduce"): 4 * samples * model.heads * (1 + 1 + model.head_size)}
        assert calls == {("cp", "all_reduce"): 2}  # sum and accumulator travel together
        assert backward == {("cp", "all_reduce"): 4 * samples * model.heads * (1 + model.head_size)}


def gradient_traffic(mesh, run):
    _, networks, _ = build(run, mesh)
    network = networks["discriminator"]
    batch = microbatch(mesh, ((4, 1, 8, 8),) * 2, run.model, (3, 3))
    with Traffic(mesh) as traffic:
        network.module(batch.x, batch.times(0.5), batch.condition, batch.layout).sum().backward()
        network.update(10)
    sizes = {
        "grad": sum(b.grad_data.nbytes for b in network.shards.ddp.buffers),
        "param": sum(b.param_data.nbytes for b in network.shards.ddp.buffers),
    }
    return dict(traffic.payload), sizes


@pytest.mark.dist
def test_data_parallel_ranks_send_each_gradient_and_each_weight_once(ranks):
    run = run_config()
    for payload, sizes in ranks(2).run(gradient_traffic, ParallelConfig(), run):
        assert payload["dp_cp", "reduce_scatter"] == sizes["grad"]
        assert payload["dp_cp", "all_gather"] == sizes["param"]


# --- scripts


def test_compare_runs_finds_the_first_difference(script, mesh, datasets, tmp_path):
    run = config(datasets, tmp_path / "a", "flow", iterations=2)
    train(run, mesh)
    train(replace(run, output=str(tmp_path / "same")), mesh)
    train(replace(run, output=str(tmp_path / "other"), optimizer=replace(run.optimizer, lr=1.001e-3)), mesh)
    code, said = script("compare_runs", tmp_path / "a", tmp_path / "same", "--json", tmp_path / "out.json")
    assert code == 0 and "equal" in said, said
    assert json.loads((tmp_path / "out.json").read_text())["equal"] is True
    other = tool(TOOLS / "compare_runs.py", tmp_path / "a", tmp_path / "other")
    assert other.returncode == 1 and "first: iteration 1: generator/lr is 0.001 and" in other.stdout
    code, said = script("compare_runs", tmp_path / "a", tmp_path / "nowhere")
    assert code == 1 and "no checkpoint there" in said


def test_compare_runs_knows_what_is_not_a_number(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    from compare_runs import difference, tensor_difference

    nan, inf = float("nan"), float("inf")
    assert difference(nan, nan) == difference(inf, inf) == difference(1.0, 1.0) == 0.0
    assert difference(nan, 1.0) == difference(inf, -inf) == difference(None, 1.0) == inf
    a = torch.tensor([1.0, nan, inf])
    assert tensor_difference(a, a.clone()) == 0.0
    assert tensor_difference(a, torch.tensor([1.0, 2.0, inf])) == inf
    assert tensor_difference(a, torch.tensor([1.0, nan, -inf])) == inf
    assert tensor_difference(torch.tensor([2.0, 4.0]), torch.tensor([2.0, 5.0])) == 0.25


def checkpoint_command(*arguments: str) -> int:
    """The exit code of `megatron-apt checkpoint`, in this process."""
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", *arguments])
    return ended.value.code


def test_the_checkpoint_commands(script, capsys, mesh, datasets, tmp_path):
    run = config(datasets, tmp_path / "run", iterations=1)
    train(run, mesh)
    seen = tool("-m", "megatron_apt", "checkpoint", "inspect", run.output)
    assert seen.returncode == 0 and "discriminator optimizer.square" in seen.stdout, seen.stderr
    copy = str(tmp_path / "copy")
    assert checkpoint_command("reshard", run.output, copy) == 0
    code, said = script("compare_runs", run.output, copy)
    assert code == 0 and f"log         not compared: none in {copy}" in said, said
    assert checkpoint_command("verify", copy) == 0
    file = next(store.latest(tmp_path / "copy").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    capsys.readouterr()
    assert checkpoint_command("verify", copy) == 1 and file.name in capsys.readouterr().out


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kills", "iterations"), [(1, 12), pytest.param(3, 40, marks=pytest.mark.slow)], ids=["1", "3"]
)
def test_kills_lose_nothing(tmp_path, kills, iterations):
    options = ("--kills", kills, "--kills-per-run", kills, "--iterations", iterations)
    done = tool(TOOLS / "crash_test.py", *options, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["identical"] == found["effective"] == found["stopped"] == kills


# --- schedules


def test_show_schedule_prices_lists_and_refuses_what_cannot_run(script, tmp_path):
    a, b, broken, picture, figures = (
        tmp_path / name for name in ("a.txt", "b.txt", "broken.txt", "s.svg", "s.json")
    )
    for file, chunks in ((a, 1), (b, 2)):
        main(
            [
                "schedule",
                "--ranks",
                "2",
                "--microbatches",
                "3",
                "--iterations",
                "1",
                "--evaluations",
                "0",
                "--chunks",
                f"{chunks}",
                "--dump",
                f"{file}",
            ]
        )
    done = tool(TOOLS / "show_schedule.py", a, b, "--picture", picture, "--json", figures)
    assert done.returncode == 0, done.stderr
    assert (
        set(json.loads(figures.read_text())["bubble"]) == {str(a), str(b)} and picture.stat().st_size > 10_000
    )
    broken.write_text(
        "\n".join(
            line
            for line in a.read_text().splitlines()
            if line.strip() != "SEND 1 F generator.0 i0 g/fake.0 m1"
        )
    )
    code, said = script("show_schedule", broken)
    assert code == 1 and "rank 0 never sends F generator.0 i0 g/fake.0 m1 to rank 1" in said


# --- memory of encoding


def test_the_peak_of_encoding_is_measured_beside_its_bound(tmp_path):
    """At toy size, by the same code, with a bound that nothing keeps."""
    result = tmp_path / "peak.json"
    done = tool(
        TOOLS / "benchmarks" / "encode_memory.py",
        "--scale",
        "0.02",
        "--only",
        "picture_rgba",
        "--bound",
        "0.01",
        "--json",
        result,
    )
    assert done.returncode == 1 and "above 0.01 GiB" in done.stdout, done.stdout + done.stderr
    written = json.loads(result.read_text())
    assert written["bound_gib"] == 0.01 and 2**26 < written["peak_bytes"]["picture_rgba"] < 2**31


# --- what is meant for a GPU, on a CPU and at toy size


def assert_measured(folder: Path) -> None:
    figures = json.loads((folder / "model.json").read_text())["figures"]
    assert figures.keys() == {
        "block bf16",
        "model bf16",
        "block bf16 without own kernels",
        "block bf16 diffusers",
    }
    assert all(found["both_s"] > 0 and "error" not in found for found in figures.values())
    blocks = json.loads((folder / "calibration.json").read_text())["blocks"]
    assert all(min(times.values()) > 0 and times.keys() == set("FIW") for times in blocks.values())


@cpu_only
def test_the_benchmark_of_the_model_runs_to_its_end(script, mesh, tmp_path, capsys):
    files = ("--json", tmp_path / "model.json", "--calibration", tmp_path / "calibration.json")
    code, said = script("benchmarks/gpu_model", "--device", "cpu", "--toy", *files)
    assert not code, said
    assert_measured(tmp_path)
    main(
        [
            "schedule",
            "--ranks",
            "2",
            "--microbatches",
            "2",
            "--calibration",
            f"{tmp_path}/calibration.json:bf16",
        ]
    )
    assert "interleaved" in capsys.readouterr().out


@cpu_only
@pytest.mark.slow
def test_everything_for_a_gpu_runs_on_a_cpu(tmp_path):
    command = ["bash", TOOLS / "benchmarks" / "gpu.sh", "--device", "cpu", "--toy", tmp_path]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_measured(tmp_path)
    assert "nothing spills" in (tmp_path / "report.md").read_text()
    assert len(json.loads((tmp_path / "kernels.json").read_text())) > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "tpu"), "--device 'tpu': use cuda or cpu"),
        (("--device", "cpu"), "--device cpu takes hours without --toy"),
        (("--tiny",), "--tiny is unknown"),
    ],
)
def test_mistakes_of_the_gpu_script_are_named(options, message):
    command = ["bash", TOOLS / "benchmarks" / "gpu.sh", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stdout
