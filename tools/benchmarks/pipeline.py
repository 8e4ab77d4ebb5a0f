"""One APT iteration over pipeline ranks: interleaved against phases apart, ours and
Megatron-Core's, and what the simulator predicts.

    python tools/benchmarks/pipeline.py [--width 192] [--depth 8] [--microbatches 8]
        [--repeats 3] [--unit 0.008] [--patience 30] [--part 1|2] [--json FILE]

1. Two ranks, real networks, fp32. Before anything is timed, the gradients of every
   schedule are compared with those of Megatron-Core's.
2. Four ranks, the same programs and messages, but stages that sleep for the time they
   would take: nothing else lets four ranks run at once on two cores. What is measured is
   the order and the messages, not arithmetic. Two ratios of costs.

Both sides of every ratio are timed in turns in one run of this script, and a run that
other processes disturb is repeated. A prediction is simulate() of the program that ran,
with the median time of each kind of action and of a message in that run: whether actions,
messages and waiting add up as the simulator says.

    / Megatron, / 1F1B   the median over repeats of a run's seconds against those of the
                         same repeat
    error                prediction / measurement - 1, of the seconds and of the ratio to
                         1F1B
    bubble               idle share of the predicted timeline
    message              from the end of an action to its result on a rank that waits for
                         it
    asleep               what sleeping alone would take: the rest is the executor's own
                         work
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from megatron_schedule import MegatronSchedule
from sleepers import Sleep, Sleeper
from small_run import on_ranks

from megatron_apt import scripts
from megatron_apt.config import ParallelConfig, PipelineConfig, RunConfig
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.base import Method
from megatron_apt.methods.build import build_method
from megatron_apt.models.parameters import declared
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.schedule.actions import Action, Task
from megatron_apt.schedule.execute import Executor, _Run
from megatron_apt.schedule.graph import Graph
from megatron_apt.schedule.mail import Mail
from megatron_apt.schedule.prepare import Pipeline
from megatron_apt.schedule.program import Program
from megatron_apt.schedule.simulate import Timeline, simulate
from megatron_apt.training.networks import Network
from support.problems import microbatch, model_config, run_config, waken

# --- one problem on all schedules

SCHEDULES = {
    "ours 1F1B, phases apart": (PipelineConfig(schedule="1f1b"), 1),
    "ours zero-bubble, phases apart": (PipelineConfig(schedule="zero_bubble"), 1),
    "ours interleaved, line": (PipelineConfig(chunks=1), 1),
    "ours interleaved, V": (PipelineConfig(chunks=2), 1),
    "ours interleaved, line, window of 4": (PipelineConfig(chunks=1), 4),
    "ours interleaved, V, window of 4": (PipelineConfig(chunks=2), 4),
}
MEGATRON, APART = "Megatron-Core, phase by phase", "ours 1F1B, phases apart"


Key = tuple[str, str, int, str, str, int]


def key_of(task: Task) -> Key:
    return task.kind, task.role, task.stage, task.phase, task.branch, task.segment


class Notes:
    """What one run of a program cost on this rank.

    Attributes:
        spent: seconds of every action with starting the sends and receives behind it, by
            kind. Waiting for its messages does not count.
        ended: when each action did. All ranks share a clock here.
        arrived: when the result of an action of another rank began to be waited for, and
            came.
    """

    def __init__(self):
        self.spent: dict[Key, list[float]] = {}
        self.ended: dict[Task, float] = {}
        self.arrived: dict[Task, tuple[float, float]] = {}

    def add(self, task: Task, began: float) -> None:
        """It has just ended."""
        self.ended[task] = time.perf_counter()
        self.spent.setdefault(key_of(task), []).append(self.ended[task] - began)

    def costs(self) -> tuple[dict[Key, float], float]:
        """Median time of each kind of action on every rank; and of a message, from the
        end of what made it, where it was waited for by then.
        """
        everyone: list[Notes] = [self] * dist.get_world_size()
        dist.all_gather_object(everyone, self)
        ended = {task: moment for notes in everyone for task, moment in notes.ended.items()}
        delays = [
            came - ended[task]
            for notes in everyone
            for task, (waiting, came) in notes.arrived.items()
            if waiting < ended[task]
        ]
        spent = {key: statistics.median(values) for notes in everyone for key, values in notes.spent.items()}
        return spent, max(0.0, statistics.median(delays)) if delays else 0.0

    @contextlib.contextmanager
    def during(self) -> Generator[None]:
        """The run; its steps are added by whoever takes them."""
        compute, post = _Run.compute, Mail.post

        def timed_compute(run: _Run, action: Action, at: int) -> None:
            for number in run._graph.sources[run._graph.number[action.task]]:
                source, began = run._graph.tasks[number], time.perf_counter()
                if source in run.mail._coming:
                    run._take_in(source)
                    self.arrived[source] = began, time.perf_counter()
            began = time.perf_counter()
            compute(run, action, at)
            self.add(action.task, began)

        def timed_post(mail: Mail, action: Action) -> None:
            began = time.perf_counter()
            post(mail, action)
            if self.ended:
                last = next(reversed(self.ended))
                self.ended[last] = time.perf_counter()
                self.spent[key_of(last)][-1] += self.ended[last] - began

        # As methods, whose `self` has another name here
        _Run.compute, Mail.post = timed_compute, timed_post  # ty: ignore[invalid-assignment]
        try:
            yield
        finally:
            _Run.compute, Mail.post = compute, post


class Ours:
    """One of our programs on networks cut as it wants them."""

    def __init__(
        self,
        method: Method,
        mesh: Mesh,
        config: PipelineConfig,
        microbatches: int,
        iterations: int,
        built: dict,
    ):
        pipeline = Pipeline(config, method, mesh)
        self.program, self.iterations = pipeline.program(microbatches, iterations), iterations
        cuts = tuple(pipeline.cut(name) for name in method.roles)
        if cuts not in built:  # networks are shared by schedules that cut them alike
            networks = {
                name: Network(name, role, mesh, pipeline.cut(name)) for name, role in method.roles.items()
            }
            waken(networks)
            built[cuts] = networks, Executor(networks, mesh)
        self.networks, self.executor = built[cuts]

    def run(self, batches, step: Callable[[str], None]) -> Notes:
        notes = Notes()

        def update(task: Task) -> None:
            began = time.perf_counter()
            step(task.role)
            notes.add(task, began)

        with notes.during():
            self.executor.run(self.program, lambda iteration: batches, update)
        return notes


def predicted(program: Program, seconds: Callable[[Task, float], float], message: float) -> Timeline:
    """The same order with other times. An executor waits for messages only, so the edges
    that kept phases apart while the order was made are gone.
    """
    old = program.graph
    graph = Graph(replace(old.window, apart=False, message=message))
    number = [graph.number[task] for task in old.tasks]
    graph.time = [seconds(task, time) for task, time in zip(graph.tasks, graph.time, strict=True)]
    return simulate(graph, [[number[task] for task in order] for order in program.order])


def gradients(
    networks: dict[str, Network], run: Callable[[Callable[[str], None]], None]
) -> dict[str, dict[str, Tensor]]:
    """Of each role in an iteration without updates, every stage's."""
    found: dict[str, dict[str, Tensor]] = {}

    def note(role: str) -> None:
        shards = networks[role].shards
        assert shards is not None  # roles that are updated train
        found[role] = {
            name: declared(p).main_grad.clone()
            for name, p in zip(shards.names, shards.parameters, strict=True)
        }
        shards.zero_grad()

    run(note)
    everyone: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, found)
    return {role: {name: value for part in everyone for name, value in part[role].items()} for role in found}


def difference(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Of the whole gradient, relative to its norm."""
    assert ours.keys() == reference.keys()
    norm = sum(float(value.double().square().sum()) for value in reference.values()) ** 0.5
    return (
        sum(float((ours[name].double() - value.double()).square().sum()) for name, value in reference.items())
        ** 0.5
        / norm
    )


QUIET = 0.05  # share of the machine that other processes may take during a run


def busy_seconds() -> float:
    """That this machine's cores have worked since it started, for anyone."""
    times = [
        float(field)
        for field in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    ]
    return (sum(times) - times[3] - times[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for disks


class Contest:
    """All schedules of one problem on this rank, run in turns.

    Attributes:
        once: names of those that run one iteration at a time.
        schedules: what has been measured of each.
    """

    def __init__(self, mesh: Mesh, problem: "Problem"):
        method, self.batches, self.problem = problem.method(mesh), problem.batches(mesh), problem
        built: dict = {}
        self.ours = {
            name: Ours(method, mesh, replace(p, **problem.plan), len(self.batches), n, built)
            for name, (p, n) in SCHEDULES.items()
        }
        line = self.ours[APART].networks
        self.megatron = MegatronSchedule(method.phases, line, mesh, problem.config.model.width)
        self.networks = {MEGATRON: line} | {name: one.networks for name, one in self.ours.items()}
        self.once = [name for name in self.networks if self._iterations(name) == 1]
        self.schedules: dict[str, dict] = {name: {"all": [], "all_predicted": []} for name in self.networks}

    def _iterations(self, name: str) -> int:
        return self.ours[name].iterations if name in self.ours else 1

    def _run(self, name: str, step: Callable[[str], None]) -> Notes | None:
        return (
            self.ours[name].run(self.batches, step)
            if name in self.ours
            else self.megatron.run(self.batches, step)
        )

    def _once(self, name: str, step: Callable[[str], None]) -> None:
        self._run(name, step)

    def gradient_differences(self) -> dict[str, dict[str, float]]:
        """Of each schedule's gradients from Megatron-Core's, by role.

        Raises:
            RuntimeError: they are not the same.
        """
        found = {
            name: gradients(self.networks[name], functools.partial(self._once, name)) for name in self.once
        }
        reference = found.pop(MEGATRON)
        differences = {
            name: {role: difference(own[role], whole) for role, whole in reference.items()}
            for name, own in found.items()
        }
        worst = max(value for one in differences.values() for value in one.values())
        if not worst <= 1e-5:
            raise RuntimeError(
                f"gradients differ by {worst:.1e}: the schedules do not compute the same thing, so their "
                "times would say nothing"
            )
        return differences

    def timed(self, name: str) -> tuple[float, float, Notes | None]:
        """The share of the machine that other processes took during a run, its seconds, and what it noted."""
        dist.barrier()
        began, own, everything = time.perf_counter(), time.process_time(), busy_seconds()
        notes = self._run(name, lambda role: self.networks[name][role].update(10_000))
        most = torch.tensor((time.perf_counter() - began, busy_seconds() - everything), dtype=torch.float64)
        ours = torch.tensor(time.process_time() - own, dtype=torch.float64)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        dist.all_reduce(ours)
        seconds = float(most[0])
        return max(0.0, float(most[1] - ours) / ((os.cpu_count() or 1) * seconds)), seconds, notes

    def quietest(self, name: str, patience: float) -> tuple[tuple[float, float, Notes | None], float]:
        """The least disturbed of the runs until one is quiet; and the patience left."""
        tries = [self.timed(name)]
        while tries[-1][0] > QUIET and patience > 0:
            patience -= tries[-1][1]
            tries.append(self.timed(name))
        return min(tries, key=lambda one: one[0]), patience

    def note(self, name: str, seconds: float, notes: Notes | None) -> None:
        """Adds a run, and what the simulator makes of its own costs."""
        given, iterations = self.schedules[name], self._iterations(name)
        given["all"].append(seconds / iterations)
        if notes:
            cost, given["message"] = notes.costs()
            foretold = predicted(
                self.ours[name].program, lambda task, _: cost[key_of(task)], given["message"]
            )
            given["all_predicted"].append(foretold.makespan / iterations)
            given["bubble"], given["cost"] = (
                foretold.bubble,
                {" ".join(map(str, key)): value for key, value in sorted(cost.items())},
            )

    def summarise(self) -> None:
        for name, given in self.schedules.items():
            given["seconds"] = statistics.median(given["all"])
            if given["all_predicted"]:
                given["predicted"] = statistics.median(given["all_predicted"])
                given["error"] = statistics.median(
                    p / s - 1 for p, s in zip(given["all_predicted"], given["all"], strict=True)
                )
            if name in self.ours and self.problem.sleep:
                asleep = predicted(
                    self.ours[name].program, lambda task, planned: planned * self.problem.unit, 0.0
                )
                given["asleep"] = asleep.makespan / self._iterations(name)


def measure(mesh: Mesh, problem: "Problem", repeats: int, patience: float) -> dict:
    contest, disturbance = Contest(mesh, problem), []
    differences = contest.gradient_differences()
    for name in contest.once:
        contest.timed(name)  # warms up
    for repeat in range(repeats):
        for name in contest.schedules:
            if name in contest.once or repeat < 2:  # a window is long enough to be run twice only
                (others, seconds, notes), patience = contest.quietest(name, patience)
                disturbance.append(others)
                contest.note(name, seconds, notes)
    contest.summarise()
    others = {"mean": statistics.mean(disturbance), "most": max(disturbance)}
    return {"gradient_difference": differences, "others": others, "schedules": contest.schedules}


@dataclass(frozen=True)
class Problem:
    """A run, its samples, and whether its stages sleep.

    Attributes:
        sleep: F, I and W of a rank's part of a network, in units; None computes.
        unit: seconds.
        plan: costs that schedules are made with.
    """

    config: RunConfig
    microbatches: int
    latents: tuple[int, int, int, int]
    unit: float = 0.0
    sleep: tuple[float, float, float] | None = None

    @property
    def plan(self) -> dict[str, float]:
        return (
            dict(zip(("forward", "input_gradient", "weight_gradient"), self.sleep, strict=True))
            if self.sleep
            else {}
        )

    def method(self, mesh: Mesh) -> Method:
        method = build_method(self.config, mesh)
        if not self.sleep:
            return method
        times = self.sleep

        def build(logits: bool):
            sleep, model = Sleep(*(self.unit * time for time in times)), self.config.model
            return lambda cut: Sleeper(
                cut, mesh, model.depth, self.config.micro_batch, sleep, logits, model.patch_width
            )

        return replace(
            method,
            roles={
                name: replace(role, build=build(name == "discriminator"))
                for name, role in method.roles.items()
            },
        )

    def batches(self, mesh: Mesh) -> list:
        n, config = self.config.micro_batch, self.config
        samples = n * self.microbatches
        return [
            microbatch(
                mesh,
                (self.latents,) * samples,
                config.model,
                (8,) * samples,
                global_batch=samples,
                rows=range(m * n, (m + 1) * n),
            )
            for m in range(self.microbatches)
        ]


# --- the tables


def report(found: dict) -> None:
    schedules, apart = found["schedules"], found["schedules"][APART]
    asleep = "asleep" in apart
    heading = f"    {'seconds of an iteration':36} {'measured':>9} {'/ Megatron':>11} {'/ 1F1B':>7}"
    heading += f" {'predicted':>10} {'error':>7} {'/ 1F1B':>7} {'error':>7} {'bubble':>7} {'message':>8}" + (
        f" {'asleep':>7}" if asleep else ""
    )
    print(heading)
    for name, one in schedules.items():
        to_megatron, ratio = (
            statistics.median(a / b for a, b in zip(one["all"], other["all"], strict=True))
            for other in (schedules[MEGATRON], apart)
        )
        one |= {"to_megatron": to_megatron, "to_1f1b": ratio}
        line = f"    {name:36} {one['seconds']:9.3f} {to_megatron:11.3f} {ratio:7.3f}"
        if "predicted" in one:
            foretold = statistics.median(a / b for a, b in zip(one["all_predicted"], apart["all_predicted"]))  # noqa: B905
            one["ratio_error"] = foretold / ratio - 1
            line += (
                f" {one['predicted']:10.3f} {one['error']:+7.1%} {foretold:7.3f} "
                f"{foretold / ratio - 1:+7.1%} {one['bubble']:7.3f}"
            )
            line += f" {1e3 * one['message']:5.2f} ms" + (f" {one['asleep']:7.3f}" if asleep else "")
        print(line)
    print(
        f"    other processes took {found['others']['mean']:.1%} of the machine during these runs, "
        f"{found['others']['most']:.1%} during one of them"
    )
    print("    whole gradients against those of Megatron-Core's schedules, relative difference:")
    for name, of_role in found["gradient_difference"].items():
        print(f"        {name:36} " + ", ".join(f"{role} {value:.1e}" for role, value in of_role.items()))


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--width", type=scripts.whole(1), default=192)
    arguments.add_argument("--depth", type=scripts.whole(1), default=8)
    arguments.add_argument("--microbatches", type=scripts.whole(1), default=8)
    arguments.add_argument("--repeats", type=scripts.whole(1), default=3)
    arguments.add_argument(
        "--unit",
        type=scripts.number(1e-6, 1e3),
        default=0.008,
        help="seconds that a sleeping stage stands for",
    )
    arguments.add_argument(
        "--patience",
        type=scripts.number(0),
        default=30.0,
        help="seconds for repeating runs that other processes disturbed, in each table",
    )
    arguments.add_argument(
        "--part", type=int, choices=(1, 2), help="only the real networks, or only the stand-ins"
    )
    arguments.add_argument("--json", metavar="FILE", default="", type=scripts.output_file)
    options = arguments.parse_args()
    found: dict = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, processes of 1 thread, torch "
        f"{torch.__version__}, gloo"
    }
    print(f"{found['machine']}; load average before {os.getloadavg()[0]:.1f}")
    apt = AptConfig(ar1_lambda=10.0, ar1_sigma=0.1)
    if options.part != 2:
        model = model_config(depth=options.depth, width=options.width, heads=8)
        config = replace(run_config("apt", model, apt), micro_batch=2, global_batch=2 * options.microbatches)
        problem = Problem(config, options.microbatches, (4, 1, 16, 16))
        print(
            f"2 ranks, two networks of {options.depth} blocks, width {options.width}, {options.microbatches} "
            "microbatches of 2 x 64 tokens, fp32"
        )
        found["computed"] = on_ranks(
            measure, 2, ParallelConfig(pp=2), problem, options.repeats, options.patience
        )[0]
        report(found["computed"])
    if options.part != 1:
        config = replace(
            run_config("apt", model_config(depth=8, dtype="float64"), apt),
            micro_batch=1,
            global_batch=options.microbatches,
        )
        for costs in ((1.0, 1.0, 1.0), (1.0, 1.8, 0.3)):
            text = "F={}, I={}, W={}".format(*costs)
            print(
                f"4 ranks whose stages sleep instead of computing ({os.cpu_count()} cores cannot run 4 at "
                f"once): {text} x {1e3 * options.unit:g} ms"
            )
            problem = Problem(config, options.microbatches, (4, 1, 4, 4), options.unit, costs)
            found[f"asleep {text}"] = on_ranks(
                measure, 4, ParallelConfig(pp=4), problem, options.repeats, options.patience
            )[0]
            report(found[f"asleep {text}"])
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    scripts.run(main)
