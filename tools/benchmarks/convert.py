"""Import and export of a Wan-1.3B-shaped checkpoint with random weights, against `cp` of
the same bytes: time, and memory of the process.

    python tools/benchmarks/convert.py [--gigabytes 2] [--rounds 3] [--json FILE]

Medians over the rounds after a first one, in which all files are read once. "whole" is
the command as a user waits for it, "alone" what it reports itself, without starting
Python; "processor" is the time of all cores together, which other programs disturb least.
Import and export end when their files are on the disk, cp when they are in memory; so cp
is also timed with `sync` after it. Memory is anonymous: what the process holds itself,
not pages of files that the system keeps for it. The program's own is that of the same
command on a checkpoint of one narrow layer.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_apt import scripts
from megatron_apt.families.wan.config import wan_1_3b
from megatron_apt.families.wan.weights import WEIGHTS as WAN
from megatron_apt.models.config import ModelConfig
from megatron_apt.parallel.mesh import Mesh

NAMES = ("cp", "flushed", "import", "export")


@dataclass(frozen=True)
class Run:
    """One command: seconds until it ended, those of all cores, those it reports without
    its start, and the most memory it held in bytes.
    """

    whole: float
    processor: float
    alone: float
    memory: int


def write_source(folder: Path, model: ModelConfig) -> tuple[int, int]:
    """A sharded bf16 checkpoint of this shape; returns its bytes and those of the largest of our tensors."""
    tensors = WAN.tensors(model, Mesh.alone(torch.device("cpu")))
    shapes = {name: shape for mapped in tensors for name, shape in mapped.theirs.items()}
    folder.mkdir(parents=True)
    weight_map, shard, number = {}, {}, 0
    names = list(shapes)
    for name in names:
        shard[name] = torch.empty(shapes[name], dtype=torch.bfloat16).uniform_(-1, 1)
        if sum(t.nbytes for t in shard.values()) > 5e8 or name == names[-1]:
            number += 1
            file = f"diffusion_pytorch_model-{number:05d}.safetensors"
            save_file(shard, folder / file)
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps(WAN.write_config(model)))
    return sum(f.stat().st_size for f in folder.iterdir()), 2 * max(
        mapped.shape.numel() for mapped in tensors
    )


def of_size(gigabytes: float) -> ModelConfig:
    """Wan-1.3B with as many of its 30 layers as make this size in bf16."""
    model = replace(wan_1_3b(), depth=1)
    tensors = WAN.tensors(model, Mesh.alone(torch.device("cpu")))
    outside, block = (
        sum(m.shape.numel() for m in tensors if ("blocks." in m.name) == inside) for inside in (False, True)
    )
    return replace(model, depth=max(1, min(30, round((gigabytes * 1e9 / 2 - outside) / block))))


def measured(command: list[str], report: Path | None = None) -> Run:
    """Runs a command that may write its own seconds to `report`."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        status = Path(f"/proc/{process.pid}/status")
        while not ended.wait(0.005):
            try:
                lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            except OSError:  # it has just ended
                return
            peak = max(peak, int(lines.get("RssAnon", "0 kB").split()[0]) * 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, code, usage = os.wait4(process.pid, 0)
    ended.set()
    whole = time.perf_counter() - start
    watcher.join()
    if code:
        sys.exit(f"{' '.join(command)} failed")
    alone = json.loads(report.read_text())["seconds"] if report else whole
    return Run(whole, usage.ru_utime + usage.ru_stime, alone, peak)


def one_round(root: Path, source: Path) -> dict[str, Run]:
    """Every command once, each behind a disk that is at rest."""
    convert, report = [sys.executable, "-W", "ignore", "-m", "megatron_apt", "convert"], root / "report.json"
    commands = {
        "cp": ["cp", "-r", f"{source}", f"{root}/cp"],
        "flushed": ["sh", "-c", f"cp -r {source} {root}/flushed && sync"],
        "import": [*convert, "import", f"{source}", f"{root}/import", "--json", f"{report}"],
        "export": [*convert, "export", f"{root}/import", f"{root}/export", "--json", f"{report}"],
    }
    runs = {}
    for name in NAMES:
        os.sync()
        runs[name] = measured(commands[name], report if name in ("import", "export") else None)
        for done in {"cp": ["cp"], "flushed": ["flushed"], "import": [], "export": ["import", "export"]}[
            name
        ]:
            # So that none of them is the first to ask a virtual machine for this much
            # memory
            shutil.rmtree(root / done)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=scripts.number(1e-3, 1e4), default=2.0)
    parser.add_argument("--rounds", type=scripts.whole(1), default=3)
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure; otherwise where temporary files go"
    )
    parser.add_argument("--json", metavar="FILE", default="", type=scripts.output_file)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        root = Path(place)
        size, largest = write_source(root / "source", of_size(options.gigabytes))
        write_source(
            root / "narrow", replace(wan_1_3b(), depth=1, width=48, heads=2, mlp_width=48, text_width=16)
        )
        idle = one_round(root, root / "narrow")
        rounds = [one_round(root, root / "source") for _ in range(options.rounds + 1)]
    print(f"{size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, medians of {options.rounds}")
    result: dict = {"bytes": size, "largest": largest}
    median = {
        name: {
            f.name: statistics.median(getattr(runs[name], f.name) for runs in rounds[1:]) for f in fields(Run)
        }
        for name in NAMES
    }
    for name, row in median.items():
        result[name] = row
        print(
            f"{name:8} whole {row['whole']:6.2f} s  alone {row['alone']:6.2f} s  processor "
            f"{row['processor']:6.2f} s",
            end="",
        )
        if name in ("cp", "flushed"):
            print()
            continue
        for kind in ("whole", "alone"):
            row |= {f"{kind}_of_{other}": row[kind] / median[other]["whole"] for other in ("cp", "flushed")}
        most = max(runs[name].memory for runs in rounds)
        row |= {
            "memory": most,
            "idle_memory": idle[name].memory,
            "memory_above_idle_of_largest": (most - idle[name].memory) / largest,
        }
        print(
            "".join(
                f"  {kind} {row[f'{kind}_of_cp']:.1f} x cp, {row[f'{kind}_of_flushed']:.1f} x flushed"
                for kind in ("whole", "alone")
            )
        )
        above = (
            f"{(most - idle[name].memory) / 1e6:.0f} MB above the program's {idle[name].memory / 1e6:.0f} MB"
        )
        print(f"{'':8} memory {above}: {row['memory_above_idle_of_largest']:.1f} x the largest tensor")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    scripts.run(main)
