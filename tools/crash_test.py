"""Kills training at random moments and checks that nothing is lost.

    python tools/crash_test.py [--kills 50] [--kills-per-run 5] [--iterations 40] [--json FILE]

Trains G and D on two ranks without disturbance, then again and again with `kill -9` of a
random rank: at a random moment, while a checkpoint is being written, or between the G and
the D phase of an iteration. After each kill the other rank must end by itself, and
training is started again. Each run that was killed must end with the log and every tensor
(weights, average, both optimisers) of the undisturbed one, bit for bit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from compare_runs import compare
from small_run import digits_run, forks, free_port, rank_environment, write_digits

from megatron_apt import scripts

RANKS = 2
STOP_WITHIN = 60.0  # seconds in which the rank that was not killed must end


# --- the run that is killed


def worker(
    log: Path,
    environment: dict[str, str],
    root: Path,
    output: Path,
    iterations: int,
    die_at: int,
    die_rank: int,
) -> None:
    """One rank, which prints into `log`. With die_at >= 0 it kills itself between the G and
    the D phase of that iteration, if it is die_rank.
    """
    import torch

    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(said, number)
    os.environ.update(environment)
    torch.set_num_threads(1)
    from megatron_apt.parallel import startup
    from megatron_apt.schedule.execute import Executor
    from megatron_apt.training.train import train

    config = digits_run(root, output, iterations=iterations)
    mesh = startup.start(config.parallel)
    run = Executor.run

    def run_or_die(self, program, batches, step):
        dying = batches(0)[0].iteration == die_at and mesh.world.rank == die_rank

        def step_and_die(task):
            step(task)
            if dying and task.role == "generator":
                os.kill(os.getpid(), signal.SIGKILL)

        return run(self, program, batches, step_and_die)

    Executor.run = run_or_die
    train(config, mesh)


# --- the one that kills


class Run:
    """Both ranks of one start."""

    def __init__(self, root: Path, output: Path, iterations: int, die_at: int = -1, die_rank: int = -1):
        output.parent.mkdir(parents=True, exist_ok=True)
        self.logs = [output.parent / f"{output.name}-rank{rank}.txt" for rank in range(RANKS)]
        port, work = free_port(), (root, output, iterations, die_at, die_rank)
        self.processes = [
            forks().Process(target=worker, args=(log, rank_environment(rank, RANKS, port), *work))
            for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def ended(self) -> bool:
        return not any(process.is_alive() for process in self.processes)

    def wait(self, seconds: float) -> bool:
        """Whether both have ended within this time."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.ended():
            time.sleep(0.05)
        return self.ended()

    def kill_all(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def succeeded(self) -> bool:
        return all(process.exitcode == 0 for process in self.processes)

    def output(self) -> str:
        return "\n".join(
            f"--- rank {rank}\n{log.read_text(encoding='utf-8')[-3000:]}"
            for rank, log in enumerate(self.logs)
        )


def iteration_of(output: Path) -> int:
    log = output / "log.jsonl"
    return len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0


def disturb(root: Path, output: Path, iterations: int, kind: str, rng: random.Random) -> dict:
    """Starts the run and kills one rank; returns what happened."""
    victim = rng.randrange(RANKS)
    begun = iteration_of(output)
    # Beyond what an earlier start has logged, so that training is really under way
    ahead = begun + rng.randrange(3)
    if kind == "between phases":
        run = Run(root, output, iterations, die_at=min(ahead, iterations - 1), die_rank=victim)
    else:
        run = Run(root, output, iterations)
        checkpoints = output / "checkpoints"
        while run.running():
            if (
                kind == "while saving"
                and iteration_of(output) > begun
                and any(checkpoints.glob(".iteration-*.tmp"))
            ):
                time.sleep(rng.random() * 0.03)
                break
            if kind == "any moment" and iteration_of(output) > ahead:
                time.sleep(rng.random() * 0.2)
                break
            time.sleep(0.001)
        if run.running():
            run.processes[victim].kill()
    until = time.monotonic() + 120
    while run.running() and time.monotonic() < until:
        time.sleep(0.02)
    killed = [process.exitcode == -signal.SIGKILL for process in run.processes]
    stopped = run.wait(STOP_WITHIN)
    said = run.output()
    run.kill_all()
    return {
        "kind": kind,
        "rank": victim,
        "iteration": iteration_of(output),
        "killed": any(killed),
        "others_stopped": stopped,
        "said": said,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--kills", type=scripts.whole(1), default=50)
    arguments.add_argument("--kills-per-run", type=scripts.whole(1), default=5)
    arguments.add_argument("--iterations", type=scripts.whole(4), default=40)
    arguments.add_argument("--seed", type=scripts.whole(0, 2**63), default=0)
    arguments.add_argument("--json", metavar="FILE", default="", type=scripts.output_file)
    options = arguments.parse_args()
    rng = random.Random(options.seed)
    kinds = ["between phases", "while saving", "any moment"]
    root = Path(tempfile.mkdtemp(prefix="crash-test-"))
    results, done, number = [], 0, 0
    try:
        write_digits(root)
        undisturbed = Run(root, root / "undisturbed", options.iterations)
        if not undisturbed.wait(600) or not undisturbed.succeeded():
            undisturbed.kill_all()
            sys.exit(f"crash_test: the undisturbed run failed\n{undisturbed.output()}")
        while done < options.kills:
            output, kills = root / f"run{number}", []
            for _ in range(min(options.kills_per_run, options.kills - done)):
                kind = kinds[(done + len(kills)) % len(kinds)]
                kills.append(disturb(root, output, options.iterations, kind, rng))
            final = Run(root, output, options.iterations)
            finished = final.wait(600) and final.succeeded()
            final.kill_all()
            comparison = (
                compare(str(root / "undisturbed"), str(output))
                if finished
                else {"equal": False, "failed": final.output()}
            )
            equal = comparison["equal"] and comparison["log"]["rows"] == options.iterations
            results.append({"kills": kills, "equal": equal, "comparison": comparison})
            done += len(kills)
            number += 1
            told = ", ".join(f"{kill['kind']} @{kill['iteration']} rank {kill['rank']}" for kill in kills)
            print(
                f"{done:3}/{options.kills} kills  {'identical' if equal else 'DIFFERENT'}   {told}",
                flush=True,
            )
            if not equal:
                print(json.dumps(comparison, indent=1))
            shutil.rmtree(output, ignore_errors=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    kills = [kill for result in results for kill in result["kills"]]
    identical = sum(len(result["kills"]) for result in results if result["equal"])
    stopped, real = sum(kill["others_stopped"] for kill in kills), sum(kill["killed"] for kill in kills)
    print(
        f"{real} of {len(kills)} kills took effect; {identical} of {len(kills)} ended bit-identical; the "
        f"other rank ended by itself after {stopped}"
    )
    if options.json:
        for kill in kills:
            del kill["said"]
        Path(options.json).write_text(
            json.dumps(
                {
                    "kills": len(kills),
                    "effective": real,
                    "identical": identical,
                    "stopped": stopped,
                    "runs": results,
                }
            )
        )
    sys.exit(not identical == stopped == real == len(kills))


if __name__ == "__main__":
    scripts.run(main)
