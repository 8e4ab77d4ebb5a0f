"""Start-up: the only place that knows whether this is CUDA + NCCL or CPU + gloo, python, torchrun or srun."""

import datetime
import math
import os
import socket
import warnings
from types import ModuleType

import torch
import torch.distributed as dist

from megatron_apt.config import ParallelConfig
from megatron_apt.parallel.groups import members_only
from megatron_apt.parallel.launcher import check_host_and_port, meeting_point, placement
from megatron_apt.parallel.mesh import Axis, Mesh

__all__ = ["placement", "start", "stop"]


def start(config: ParallelConfig) -> Mesh:
    """Joins the process group, lays the mesh over it and returns it. Safe to call again
    with the same sizes.

    Raises:
        ValueError: the mesh does not fit the number of processes.
    """
    cuda = torch.cuda.is_available()
    rank, world, local_rank = placement()
    if cuda:
        choose_connections(config)
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    model_parallel = config.tp * config.cp * config.pp
    if world % model_parallel:
        raise ValueError(
            f"tp={config.tp} x cp={config.cp} x pp={config.pp} = {model_parallel} ranks do not divide the "
            f"{world} processes started; start a multiple of {model_parallel} processes or change "
            "--parallel.tp / cp / pp"
        )
    if config.context_parallel in ("p2p", "a2a+p2p") and not cuda:
        raise ValueError(
            f"parallel.context_parallel={config.context_parallel!r} is Transformer Engine's, on CUDA; there "
            "is none: use ulysses or all_gather"
        )
    if not dist.is_initialized():
        _join("nccl" if cuda else "gloo", rank, world, config.timeout_minutes)
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        lay(parallel_state, config)
    mesh = _mesh(
        parallel_state,
        config,
        torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
    )
    sizes = (mesh.tp.size, mesh.cp.size, mesh.pp.size)
    if sizes != (config.tp, config.cp, config.pp):
        raise ValueError(
            f"this process already runs a mesh tp, cp, pp = {sizes}, which cannot become "
            f"{(config.tp, config.cp, config.pp)}"
        )
    return mesh


def choose_connections(config: ParallelConfig) -> None:
    """Sets CUDA_DEVICE_MAX_CONNECTIONS, which is read when the device is first used.

    With 1, kernels of all streams start in the order in which they were launched. Tensor
    parallelism wants that: a collective launched before the product that it is to run
    beside gets its few multiprocessors first (Megatron-Core's tensor_parallel/layers.py
    relies on it). In a pipeline it is harmful: a message would wait behind every product
    launched before it on the other stream. There it is left as it is, and 1 is warned of.
    """
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    if config.pp > 1:
        if os.environ.get(name) == "1":
            warnings.warn(
                f"{name}=1: with parallel.pp={config.pp} messages wait behind the products launched before "
                "them; unset it",
                stacklevel=2,
            )
    elif config.tp > 1:
        os.environ.setdefault(name, "1")


def lay(parallel_state: ModuleType, config: ParallelConfig) -> None:
    """Makes the groups of a mesh, over a process group that everyone has joined."""
    with members_only(parallel_state, config.pp):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tp,
            pipeline_model_parallel_size=config.pp,
            context_parallel_size=config.cp,
            hierarchical_context_parallel_sizes=_levels(config),
            distributed_timeout_minutes=math.ceil(config.timeout_minutes),
            create_gloo_process_groups=False,  # beside NCCL's, which nothing here uses
        )


def _levels(config: ParallelConfig) -> list[int] | None:
    inner = config.context_parallel_inner
    return [inner, config.cp // inner] if inner else None


def stop() -> None:
    """Leaves the process group; a later `start` may lay another mesh."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(backend: str, rank: int, world: int, timeout_minutes: float) -> None:
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if world == 1:
        # No port is opened for a lone process, whatever MASTER_ADDR says: several may run on one machine.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    address, port = meeting_point()
    # Torchrun listens there already, and has met everyone
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not agent:
        check_host_and_port(address, port, rank, timeout.total_seconds())
    try:
        hosts = rank == 0 and not agent
        store = dist.TCPStore(
            address,
            port,
            world,
            hosts,
            datetime.timedelta(seconds=60),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:300]
        raise ValueError(
            f"MASTER_ADDR={address}, MASTER_PORT={port}: the ranks cannot meet there ({reason}); give "
            "another port or address"
        ) from error
    store.set_timeout(timeout)
    _await_everyone(store, rank, world, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def _await_everyone(store: dist.TCPStore, rank: int, world: int, timeout: datetime.timedelta) -> None:
    store.set(f"here/{rank}", socket.gethostname())
    try:
        store.wait([f"here/{other}" for other in range(world)], timeout)
    except RuntimeError as error:
        missing = [other for other in range(world) if not store.check([f"here/{other}"])]
        raise ValueError(
            f"ranks {missing[:8]} of {world} have not come within {timeout}; look for their messages, and "
            "start all of them"
        ) from error


def _mesh(parallel_state, config: ParallelConfig, device: torch.device) -> Mesh:
    def axis(group) -> Axis:
        return Axis(dist.get_world_size(group), dist.get_rank(group), group)

    return Mesh(
        tp=axis(parallel_state.get_tensor_model_parallel_group()),
        cp=axis(parallel_state.get_context_parallel_group()),
        pp=axis(parallel_state.get_pipeline_model_parallel_group()),
        dp=axis(parallel_state.get_data_parallel_group()),
        dp_cp=axis(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        # On one stage no group is needed beside the world.
        stage=axis(
            parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            if config.pp > 1
            else dist.group.WORLD
        ),
        world=axis(dist.group.WORLD),
        device=device,
        sequence_parallel=config.sequence_parallel and config.tp > 1,
        context_parallel=config.context_parallel,
        row_multiple=config.row_multiple,
        cp_levels=tuple(parallel_state.get_hierarchical_context_parallel_groups())
        if config.context_parallel_inner
        else (),
    )
