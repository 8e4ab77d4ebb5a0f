"""megatron-apt plan: what a recipe's networks need on each rank.

Counted from the model's own parameters, built without memory: what each rank holds of
them under tensor parallelism, and of fp32 masters, optimiser states and average under
data x context parallelism. Activations are not counted.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from megatron_apt import outputs
from megatron_apt.config import ParallelConfig, RunConfig, check_heads
from megatron_apt.methods.base import Role
from megatron_apt.methods.build import build_method
from megatron_apt.models.parameters import declared, full_shape
from megatron_apt.models.stages import Cut
from megatron_apt.outputs import check_number
from megatron_apt.parallel import startup
from megatron_apt.parallel.mesh import Axis, Mesh
from megatron_apt.schedule import calibration
from megatron_apt.schedule.calibration import Calibration
from megatron_apt.schedule.prepare import Pipeline
from megatron_apt.training.fit import fitted
from megatron_apt.training.optimizers import STATES

GIB = 2**30


@dataclass(frozen=True)
class PlanConfig:
    ranks: int = 8
    calibration: str = ""
    """A file of tools/benchmarks/gpu.sh, or FILE:FORMAT: also prints the least time of an
    iteration by its measured blocks.
    """
    json: str = ""
    """Also writes the figures to this file."""

    def __post_init__(self) -> None:
        check_number("ranks", self.ranks, 1, 2**20)


@dataclass(frozen=True)
class RoleMemory:
    """Bytes of one network on one rank.

    Attributes:
        weights: trained numbers on this tensor-parallel rank.
        shard: numbers of them whose master, states and average this rank keeps.
        parts: bytes by what they are.
    """

    role: str
    weights: int
    shard: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def role_memory(
    name: str, numbers: Mapping[torch.dtype, int], frozen: int, shards: int, optimizer: str, average: bool
) -> RoleMemory:
    """Memory of a network that trains so many weights of each dtype on a rank, sharded
    over `shards` ranks, beside `frozen` bytes that do not.

    Weights are kept in their own dtype; gradients are accumulated, and masters, states
    and averages kept, in fp32 (fp64 for fp64 weights).
    """
    weights = sum(numbers.values())
    parts = {"weights": sum(dtype.itemsize * n for dtype, n in numbers.items()) + frozen}
    if not numbers:
        return RoleMemory(name, weights, 0, parts)
    wide = {dtype: torch.promote_types(dtype, torch.float32).itemsize for dtype in numbers}
    shard = {dtype: -(-n // shards) for dtype, n in numbers.items()}
    kept = sum(wide[dtype] * n for dtype, n in shard.items())
    parts["gradients"] = sum(wide[dtype] * n for dtype, n in numbers.items())
    parts["masters"] = kept
    for state in STATES[optimizer]:
        parts[f"state {state}"] = kept
    if average:
        parts["average"] = kept
    return RoleMemory(name, weights, sum(shard.values()), parts)


def memory(config: RunConfig, ranks: int, optimizer: str | None = None) -> list[RoleMemory]:
    """Memory of each role on the one of `ranks` ranks that holds most.

    `optimizer` counts another one's states.

    Raises:
        ValueError: ranks that the recipe's tp x cp x pp does not divide, or heads that
            its tp and cp do not.
    """
    parallel = config.parallel
    check_heads(config.model, parallel)
    model_parallel = parallel.tp * parallel.cp * parallel.pp
    if ranks % model_parallel:
        raise ValueError(
            f"ranks={ranks} is not a multiple of tp x cp x pp = {model_parallel} of the recipe; use one, or "
            "change its parallel"
        )
    # Shapes and dtypes without memory
    mesh = replace(startup.start(ParallelConfig()), device=torch.device("meta"))
    method = build_method(replace(config, parallel=ParallelConfig()), mesh)
    stages = [replace(mesh, pp=Axis(parallel.pp, rank, None)) for rank in range(parallel.pp)]
    pipelines = [Pipeline(config.pipeline, method, stage) for stage in stages]
    held = (
        [
            _held(name, role, pipeline.cut(name), config, mesh, ranks, optimizer)
            for name, role in method.roles.items()
        ]
        for pipeline in pipelines
    )
    return max(held, key=lambda roles: sum(role.total for role in roles))


def _held(
    name: str, role: Role, cut: Cut, config: RunConfig, mesh: Mesh, ranks: int, optimizer: str | None
) -> RoleMemory:
    """Memory of the stages of a role that one rank holds."""
    parallel = config.parallel
    with torch.device("meta"):
        module = role.build(cut)
    trained: Counter[torch.dtype] = Counter()
    frozen = 0
    for parameter_name, p in module.named_parameters():
        whole = torch.Size(full_shape(p, mesh)).numel()
        held = whole // parallel.tp if declared(p).sharded_dim is not None else whole
        if role.trained(parameter_name, p):
            trained[p.dtype] += held
        else:
            frozen += held * p.dtype.itemsize
    settings = role.optimizer
    kind = (optimizer or settings.kind) if trained and settings is not None else ""
    return role_memory(name, trained, frozen, ranks // (parallel.tp * parallel.pp), kind, role.ema)


def iteration_seconds(config: RunConfig, ranks: int, measured: Calibration) -> float:
    """Time of an iteration in which every rank computes all the time: the blocks of every
    pass, for samples as long as the calibration's.

    Embeddings, heads, communication and idle ranks come on top.
    """
    mesh = replace(startup.start(ParallelConfig()), device=torch.device("meta"))
    method = build_method(replace(config, parallel=ParallelConfig()), mesh)
    cost, total = measured.block(config.model), 0.0
    for segment in (
        segment for phase in method.phases for branch in phase.branches for segment in branch.segments
    ):
        passes = (
            cost.F + (cost.I if segment.grad != "none" else 0.0) + (cost.W if segment.grad == "full" else 0.0)
        )
        total += segment.copies * method.roles[segment.role].depth * passes
    return total * config.global_batch / ranks


def plan(config: RunConfig, options: PlanConfig) -> None:
    """Prints the table, and the sum beside that of Adam's two states.

    Raises:
        ValueError: a file that cannot be read or written, before anything is counted;
            ranks that the recipe's tp x cp x pp does not divide; what the recipe leaves open
            and neither a checkpoint nor a dataset tells.
    """
    outputs.check("json", options.json)
    measured = calibration.read(options.calibration) if options.calibration else None
    config = fitted(config)
    kind = config.optimizer.kind
    ours, adam = memory(config, options.ranks), memory(config, options.ranks, optimizer="adamw")
    parallel = config.parallel
    data = options.ranks // (parallel.tp * parallel.cp * parallel.pp)
    table = Table(
        title=f"Memory of one rank, GiB: tp {parallel.tp} x cp {parallel.cp} x pp {parallel.pp} x dp "
        f"{data}, optimiser {kind}"
    )
    table.add_column("")
    for role in ours:
        table.add_column(f"{role.role}\ntrains {role.weights / 1e6:,.1f} M", justify="right")
    for part in dict.fromkeys(part for role in ours for part in role.parts):
        table.add_row(part, *(f"{role.parts.get(part, 0) / GIB:.3f}" for role in ours))
    table.add_row("total", *(f"{role.total / GIB:.3f}" for role in ours))
    table.add_row(
        "bytes per trained weight",
        *(f"{role.total / role.weights:.2f}" if role.weights else "-" for role in ours),
    )
    table.add_row(
        "bytes per sharded weight", *(f"{_sharded(role):.0f}" if role.shard else "-" for role in ours)
    )
    console = Console()
    console.print(table)
    total, other = sum(role.total for role in ours), sum(role.total for role in adam)
    saved = other - total
    console.print(
        f"All networks: {total / GIB:.3f} GiB with {kind} ({len(STATES[kind])} state), {other / GIB:.3f} GiB "
        f"with Adam (2 states): {saved / GIB:.3f} GiB saved. Activations come on top."
    )
    seconds = None
    if measured:
        seconds = iteration_seconds(config, options.ranks, measured)
        console.print(
            f"An iteration of {config.global_batch} samples of {measured.visual_tokens:,} + "
            f"{measured.text_tokens} tokens takes at least {seconds:.1f} s on {options.ranks} ranks "
            f"({measured.what}): blocks alone, every rank busy."
        )
    if options.json:
        figures = {
            "least_seconds": seconds,
            "ranks": options.ranks,
            "optimizer": kind,
            "bytes": total,
            "bytes_with_adam": other,
            "roles": {
                role.role: {"weights": role.weights, "shard": role.shard, **role.parts} for role in ours
            },
        }
        outputs.write("json", options.json, json.dumps(figures, indent=1))


def _sharded(role: RoleMemory) -> float:
    """Bytes for each weight of the shard: master, states and average."""
    return sum(size for part, size in role.parts.items() if part not in ("weights", "gradients")) / role.shard
