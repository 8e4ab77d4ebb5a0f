"""Time of one training step: our MMDiT against diffusers' SD3Transformer2DModel of the
same shape, in one run.

    python tools/benchmarks/step_time.py [--json FILE] [--threads 2] [--repeats 7]

8 layers, 8 heads x 64, 1,024 visual and 77 text tokens, batch 1, QK RMSNorm on both
sides. A step is forward, backward and the same AdamW over the same fp32 masters. Steps of
the two models alternate, so that a busy machine slows both; the medians are compared.
"""

import argparse
import json
import platform
import statistics
import time

import torch

from megatron_apt import scripts
from megatron_apt.config import OptimizerConfig, ParallelConfig
from megatron_apt.families.mmdit.config import MMDiTConfig
from megatron_apt.families.mmdit.model import MMDiT
from megatron_apt.models import parameters
from megatron_apt.models.condition import Condition
from megatron_apt.models.config import Dtype
from megatron_apt.models.layout import build_layout
from megatron_apt.models.parts import DTYPES
from megatron_apt.parallel.startup import start
from megatron_apt.training.optimizers import AdamW
from megatron_apt.training.sharded import ShardedParameters

LAYERS, HEADS, HEAD, CHANNELS, SIDE, TEXT, TEXT_WIDTH = 8, 8, 64, 16, 64, 77, 1024


class Step:
    """A training step of one model: `loss()` builds the graph."""

    def __init__(self, model: torch.nn.Module, loss, mesh):
        for parameter in model.parameters():
            if not hasattr(parameter, "sharded_dim"):  # of a model that is not ours
                parameters.declare(parameter, parameters.zeros)
        config = OptimizerConfig(kind="adamw")
        self.loss, self.shards = loss, ShardedParameters(model, mesh, config)
        self.optimizer = AdamW(self.shards, config)
        self.seconds: dict[str, list[float]] = {"forward": [], "backward": [], "update": [], "step": []}

    def run(self) -> None:
        marks = [time.perf_counter()]
        loss = self.loss()
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        self.optimizer.step(1e-4)
        self.shards.gather()
        self.shards.zero_grad()
        marks.append(time.perf_counter())
        for name, a, b in zip(("forward", "backward", "update"), marks[:-1], marks[1:], strict=True):
            self.seconds[name].append(b - a)
        self.seconds["step"].append(marks[-1] - marks[0])

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values[1:]) for name, values in self.seconds.items()}


def ours(dtype: Dtype, mesh) -> Step:
    shape = MMDiTConfig(
        depth=LAYERS,
        width=HEADS * HEAD,
        heads=HEADS,
        latent_channels=CHANNELS,
        text_width=TEXT_WIDTH,
        dtype=dtype,
    )
    model = MMDiT(shape, mesh)
    parameters.initialise(model, mesh, 0)
    layout = build_layout(((1, SIDE // 2, SIDE // 2),), (TEXT,), mesh)
    x = torch.randn(SIDE * SIDE // 4, shape.patch_width, dtype=DTYPES[dtype])
    condition = Condition.pack([torch.randn(TEXT, TEXT_WIDTH, dtype=DTYPES[dtype])])
    t = torch.tensor([0.5])
    return Step(model, lambda: model(x, t, condition, layout).float().square().mean(), mesh)


def theirs(dtype: str, mesh) -> Step:
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=HEADS * HEAD,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=SIDE,
        qk_norm="rms_norm",
    ).to(DTYPES[dtype])
    x = torch.randn(1, CHANNELS, SIDE, SIDE, dtype=DTYPES[dtype])
    text, pooled = (
        torch.randn(1, TEXT, TEXT_WIDTH, dtype=DTYPES[dtype]),
        torch.randn(1, TEXT_WIDTH, dtype=DTYPES[dtype]),
    )
    t = torch.tensor([500.0])

    def loss():
        out = model(
            hidden_states=x,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=t,
            return_dict=False,
        )[0]
        return out.float().square().mean()

    return Step(model, loss, mesh)


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--json", metavar="FILE", default="", type=scripts.output_file)
    arguments.add_argument("--threads", type=scripts.whole(1), default=2)
    arguments.add_argument("--repeats", type=scripts.whole(1), default=7)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    mesh = start(ParallelConfig())
    results: dict = {"machine": f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}"}
    for dtype in ("float32", "bfloat16"):
        steps = {"ours": ours(dtype, mesh), "diffusers": theirs(dtype, mesh)}
        for _ in range(options.repeats + 1):  # the first of each warms up
            for step in steps.values():
                step.run()
        results[dtype] = {name: step.medians() for name, step in steps.items()}
        results[dtype]["ratio"] = results[dtype]["ours"]["step"] / results[dtype]["diffusers"]["step"]
        for name in steps:
            print(
                f"{dtype:9} {name:10} "
                + "  ".join(f"{part} {seconds:.3f} s" for part, seconds in results[dtype][name].items())
            )
        print(f"{dtype:9} ours / diffusers: {results[dtype]['ratio']:.2f}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    scripts.run(main)
