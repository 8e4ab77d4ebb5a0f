"""What saving costs: a background save against a blocking torch.save of the same bytes,
in one run; and the time to resume.

    python tools/benchmarks/checkpoint.py [--width 512] [--saves 5] [--json FILE]

G and D with their masters, RMSProp states and the average, on one rank. The stall is the
time the training loop is held up: planning, snapshot and start of the thread, and later
the commit. Iterations beside the writing thread are timed too.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from small_run import digits_run, write_digits

from megatron_apt import scripts
from megatron_apt.config import ParallelConfig
from megatron_apt.families.mmdit.config import MMDiTConfig
from megatron_apt.parallel import startup
from megatron_apt.training.train import Trainer


def blocking_save(tensors: dict, file: Path) -> float:
    """Seconds of torch.save to disk, flushed."""
    began = time.perf_counter()
    with open(file, "wb") as stream:
        torch.save(tensors, stream)
        stream.flush()
        os.fsync(stream.fileno())
    return time.perf_counter() - began


def timed(rows: list[float], action) -> None:
    began = time.perf_counter()
    action()
    rows.append(time.perf_counter() - began)


def measure(trainer: Trainer, root: Path, saves: int) -> dict:
    rows: dict[str, list[float]] = {
        name: [] for name in ("torch_save", "stall", "commit", "write", "step_alone", "step_beside")
    }
    trainer.step()
    # The first save, which allocates the snapshot's memory, is reported by itself
    for number in range(saves + 1):
        timed(rows["step_alone"], trainer.step)
        timed(rows["stall"], trainer.save)
        steps, began = 0, time.perf_counter()
        while trainer.checkpoints.writing:
            trainer.step()
            steps += 1
        rows["write"].append(time.perf_counter() - began)
        if steps:
            rows["step_beside"].append(rows["write"][-1] / steps)
        timed(rows["commit"], trainer.checkpoints.commit)
        state = {
            key: t.data for network in trainer.networks.values() for key, t in network.sharded_state().items()
        }
        rows["torch_save"].append(blocking_save(state, root / "blocking.pt"))
        if number == 0:
            first = rows["stall"].pop()
    medians = {name: statistics.median(values) for name, values in rows.items() if values}
    return medians | {"first_stall": first, "bytes": sum(t.nbytes for t in state.values())}


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--width", type=scripts.whole(1), default=512)
    arguments.add_argument("--saves", type=scripts.whole(1), default=5)
    arguments.add_argument("--threads", type=scripts.whole(1), default=2)
    arguments.add_argument("--json", metavar="FILE", default="", type=scripts.output_file)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_digits(root)
        mesh = startup.start(ParallelConfig())
        model = MMDiTConfig(depth=6, width=options.width, heads=8, latent_channels=4, text_width=8)
        config = digits_run(root, root / "run", model, global_batch=4, micro_batch=4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(config, mesh)
            found = measure(trainer, root, options.saves)
            del trainer
            resume, build, read = [], [], []
            timed(resume, lambda: Trainer(config, mesh))
            timed(build, lambda: Trainer(replace(config, output=str(root / "other")), mesh))
            timed(read, lambda: torch.load(root / "blocking.pt", weights_only=True))
            found |= {"build": build[0], "resume": resume[0], "torch_load": read[0]}
    found["stall_ratio"] = (found["stall"] + found["commit"]) / found["torch_save"]
    found["machine"] = f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}"
    print(f"{found['bytes'] / 2**20:,.0f} MiB, medians of {options.saves} saves, {found['machine']}")
    print(f"blocking torch.save       {found['torch_save']:8.3f} s")
    print(
        f"background: stall         {found['stall']:8.3f} s  + commit {found['commit']:.3f} s  = "
        f"{found['stall_ratio']:.2f} of the blocking one"
    )
    print(f"            first stall   {found['first_stall']:8.3f} s  (allocates the snapshot's memory)")
    print(f"            written after {found['write']:8.3f} s  (with checksums, beside training)")
    if "step_beside" in found:
        print(
            f"iteration alone           {found['step_alone']:8.3f} s  beside the writing thread "
            f"{found['step_beside']:.3f} s"
        )
    print(f"build and resume          {found['resume']:8.3f} s")
    print(
        f"            building alone{found['build']:8.3f} s  torch.load of the same bytes "
        f"{found['torch_load']:.3f} s"
    )
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    scripts.run(main)
