"""Import and export of a Wan-1.3B-shaped checkpoint with random weights, against `cp` of the same bytes: time, and memory of the process.

    python tools/benchmarks/convert.py [--gigabytes 2] [--rounds 3] [--json FILE]

Medians over the rounds after a first one, in which all files are read once. "alone" is what the command itself reports, without starting Python.
Import and export end when their files are on the disk, cp when they are in memory; so cp is also timed with `sync` after it.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_apt.config import ParallelConfig
from megatron_apt.convert.wan import WAN
from megatron_apt.models.config import wan_1_3b
from megatron_apt.parallel import startup


def write_source(folder: Path, gigabytes: float) -> tuple[int, int]:
    """A sharded bf16 checkpoint with as many of Wan-1.3B's 30 layers as make this size; returns its bytes and those of the largest of our tensors."""
    mesh = startup.start(ParallelConfig())
    model = replace(wan_1_3b(), depth=1)
    outside, block = (sum(m.shape.numel() for m in WAN.tensors(model, mesh) if ("blocks." in m.name) == inside) for inside in (False, True))
    model = replace(model, depth=max(1, min(30, round((gigabytes * 1e9 / 2 - outside) / block))))
    tensors = WAN.tensors(model, mesh)
    startup.stop()
    shapes = {name: shape for mapped in tensors for name, shape in mapped.theirs.items()}
    folder.mkdir()
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
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(WAN.write_config(model)))
    return sum(f.stat().st_size for f in folder.iterdir()), 2 * max(mapped.shape.numel() for mapped in tensors)


def measured(command: list[str]) -> tuple[float, int]:
    """Seconds, and the most anonymous memory the process had: what it holds itself, not pages of files that the system keeps for it."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0

    def watch() -> None:
        nonlocal peak
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            except OSError:
                return
            if "RssAnon" in lines:
                peak = max(peak, int(lines["RssAnon"].split()[0]) * 1024)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if process.wait():
        sys.exit(f"{' '.join(command)} failed")
    watcher.join()
    return time.perf_counter() - start, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        size, largest = write_source(root / "source", options.gigabytes)
        convert = [sys.executable, "-W", "ignore", "-m", "megatron_apt", "convert"]
        idle = measured([sys.executable, "-W", "ignore", "-c", "import megatron_apt.convert.command"])[1]
        rounds: list[dict[str, tuple[float, float, int]]] = []
        for _ in range(options.rounds + 1):
            commands = {
                "cp": ["cp", "-r", str(root / "source"), str(root / "copy")],
                "flushed": ["sh", "-c", f"cp -r {root / 'source'} {root / 'flushed'} && sync"],
                "import": [*convert, "import", str(root / "source"), str(root / "imported"), "--json", str(root / "import.json")],
                "export": [*convert, "export", str(root / "imported"), str(root / "exported"), "--json", str(root / "export.json")],
            }
            rows = {}
            for name, command in commands.items():
                subprocess.run(["sync"], check=True)
                seconds, peak = measured(command)
                alone = seconds if name in ("cp", "flushed") else json.loads((root / f"{name}.json").read_text())["seconds"]
                rows[name] = seconds, alone, peak
            rounds.append(rows)
            for folder in ("copy", "flushed", "imported", "exported"):
                shutil.rmtree(root / folder)
    print(f"{size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB; the program by itself holds {idle / 1e6:.0f} MB")
    result = {"bytes": size, "largest": largest, "idle_bytes": idle}
    copied, flushed = (statistics.median(rows[name][0] for rows in rounds[1:]) for name in ("cp", "flushed"))
    for name in rounds[0]:
        seconds, alone = (statistics.median(rows[name][i] for rows in rounds[1:]) for i in range(2))
        above = max(max(rows[name][2] for rows in rounds) - idle, 0)
        times = f"{alone / copied:4.1f} x cp  {alone / flushed:4.1f} x flushed"
        print(f"{name:7} {seconds:6.1f} s  alone {alone:6.1f} s  {size / 1e9 / alone:5.2f} GB/s  {times}", end="")
        print("" if name in ("cp", "flushed") else f"  memory above the program's {above / 1e6:.0f} MB, {above / largest:.1f} x the largest tensor")
        figures = {
            "seconds": seconds,
            "alone_seconds": alone,
            "of_cp": alone / copied,
            "of_flushed_cp": alone / flushed,
            "bytes_above_idle": above,
            "of_largest": above / largest,
        }
        result[name] = figures
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
