"""Two ranks: step time with and without overlapped reduction, and bytes sent over each
axis against the least possible.

    python tools/benchmarks/data_parallel.py [--width 256] [--steps 8] [--json FILE]

Bytes are counted in one APT iteration (megatron_apt/parallel/traffic.py). The least
possible follows from what must cross:
    dp   every gradient summed once (reduce-scatter) and every updated weight spread once
         (all-gather), for each network
    tp   tokens x width: each block gathers a stream's tokens before two linear layers and
         scatters them after two, forward and for the gradient of its input; a query head
         gathers once; gradients are gathered at the entry. What comes on top is another
         gather of inputs for each weight gradient (the price of not keeping them), and
         vectors of each sample, which count here because its 16 tokens are so few.
    cp   Ulysses: q, k, v and the output to and fro, forward and backward; on top come the
         heads' three small sums
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from small_run import digits_run, on_ranks, write_digits

from megatron_apt import scripts
from megatron_apt.config import ParallelConfig, RunConfig
from megatron_apt.families.mmdit.config import MMDiTConfig
from megatron_apt.parallel.mesh import Mesh

if TYPE_CHECKING:
    from megatron_apt.training.train import Trainer


def time_steps(mesh: Mesh, config: RunConfig, steps: int) -> list[float]:
    from megatron_apt.training.train import Trainer

    overlapped, plain = (
        Trainer(
            replace(
                config,
                output=f"{config.output}-{name}",
                optimizer=replace(config.optimizer, overlap=name == "on"),
            ),
            mesh,
        )
        for name in ("on", "off")
    )
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    # Alternating, so that a busy machine slows both; the first two of each warm up
    for _ in range(steps + 2):
        for name, trainer in (("on", overlapped), ("off", plain)):
            torch.distributed.barrier()
            began = time.perf_counter()
            trainer.step()
            seconds[name].append(time.perf_counter() - began)
    return [statistics.median(values[2:]) for values in seconds.values()]


def count_bytes(mesh: Mesh, config: RunConfig) -> tuple[dict[str, int], dict[str, int]]:
    """({axis kind: bytes sent}, {axis: least possible})."""
    from megatron_apt.parallel.traffic import Traffic
    from megatron_apt.training.train import Trainer

    trainer = Trainer(config, mesh)
    trainer.step()  # from the second on, reductions overlap
    with Traffic(mesh) as traffic:
        trainer.step()
    return {f"{axis} {kind}": count for (axis, kind), count in sorted(traffic.sent.items()) if count}, least(
        trainer, config, mesh
    )


def least(trainer: "Trainer", config: RunConfig, mesh: Mesh) -> dict[str, int]:
    share = {
        name: (axis.size - 1) / axis.size
        for name, axis in (("tp", mesh.tp), ("cp", mesh.cp), ("dp_cp", mesh.dp_cp))
    }
    trained = [network.shards for network in trainer.networks.values() if network.shards is not None]
    weights = sum(p.numel() * p.itemsize for shards in trained for p in shards.parameters)
    found = {"dp_cp": round(2 * share["dp_cp"] * weights)}
    batches = trainer.batches.iteration(0)
    model, width = config.model, torch.tensor([]).element_size() * config.model.width
    visual = sum(len(b.shapes) * (b.shapes[0][2] // 2) * (b.shapes[0][3] // 2) for b in batches) * width
    text = sum(len(b.shapes) * (config.data.text_length or 0) for b in batches) * width
    # Passes of the global batch through a network in one iteration (methods/apt/method.py):
    # generator in both phases, one with gradients; discriminator on the fake ones in
    # both, and on the real ones and their perturbation together, all with gradients of
    # their inputs.
    forward, inputs, of_discriminator = 2 + 4, 1 + 4, 4
    passes, heads = forward + inputs, len(config.apt.head_layers)
    if mesh.sequence_parallel:
        gathered_visual = model.depth * 4 * passes + heads * 2 * of_discriminator + inputs
        # The last block reads text for keys and values only. In the G phase nothing asks
        # for D's gradient of text, at its entry or first block.
        gathered_text = (model.depth - 1) * 4 * passes + passes + (inputs - 1) - 1
        found["tp"] = round(share["tp"] * (visual * gathered_visual + text * gathered_text))
    if mesh.cp.size > 1:
        found["cp"] = round(share["cp"] * model.depth * (visual + text) / mesh.cp.size * 4 * passes)
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--width", type=scripts.whole(1), default=256)
    arguments.add_argument("--steps", type=scripts.whole(1), default=8)
    arguments.add_argument("--json", metavar="FILE", default="", type=scripts.output_file)
    options = arguments.parse_args()
    found: dict = {
        "machine": f"{platform.machine()}, 2 processes of 1 thread, torch {torch.__version__}, gloo"
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_digits(root)
        model = MMDiTConfig(depth=6, width=options.width, heads=8, latent_channels=4, text_width=8)
        config = digits_run(root, root / "run", model, global_batch=8, micro_batch=4)
        config = replace(config, optimizer=replace(config.optimizer, bucket_size=1_000_000))
        on, off = (
            max(pair)
            for pair in zip(*on_ranks(time_steps, 2, ParallelConfig(), config, options.steps), strict=True)
        )
        found["step"] = {"overlapped": on, "not_overlapped": off}
        print(
            f"{found['machine']}\nstep of dp 2: overlapped {on:.3f} s, not overlapped {off:.3f} s = "
            f"{on / off:.2f}"
        )
        found["bytes"] = {}
        small = replace(config, model=replace(model, width=48, heads=4, depth=3))
        for name, parallel in (
            ("dp 2", ParallelConfig()),
            ("tp 2", ParallelConfig(tp=2)),
            ("cp 2", ParallelConfig(cp=2)),
        ):
            sent, lowest = on_ranks(
                count_bytes,
                2,
                parallel,
                replace(small, output=f"{small.output}-{name[:2]}", parallel=parallel),
            )[0]
            found["bytes"][name] = {"sent": sent, "least": lowest}
            print(f"{name}: bytes sent by a rank in one iteration")
            for axis, count in sent.items():
                print(f"    {axis:24} {count:12,}")
            for axis, count in lowest.items():
                total = sum(value for key, value in sent.items() if key.split()[0] == axis)
                if total:
                    print(f"    {axis:24} {total:12,} in all, least possible {count:,}: {total / count:.2f}")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    scripts.run(main)
