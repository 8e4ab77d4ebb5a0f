"""What the environment says of this process's place among others: torchrun's variables,
an srun step, MPI's, or none.

Half an environment is refused by name: what is started as one of several must not run
alone, with others doing the same beside it.
"""

import errno
import os
import socket
import subprocess
import time

_MPI = (  # (size, rank, local rank) of Open MPI, MPICH and Intel MPI, MVAPICH, IBM's jsrun, Flux
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK"),
    ("FLUX_JOB_SIZE", "FLUX_TASK_RANK", "FLUX_TASK_LOCAL_ID"),
)
_START = "start with torchrun or srun"
UNREACHABLE = 60.0  # seconds in which rank 0's machine must be found


def placement() -> tuple[int, int, int]:
    """(rank, world size, local rank); 0 of 1 under plain python.

    Raises:
        ValueError: naming a variable that is missing, is no number, or contradicts
            another.
    """
    env = os.environ
    step = _step()
    mpi = _mpi(step)
    if "RANK" in env or "LOCAL_RANK" in env or env.get("WORLD_SIZE", "1") != "1":
        return _torch(step, mpi)
    if mpi:
        return mpi
    return step or (0, 1, 0)


def _torch(step: tuple[int, int, int] | None, mpi: tuple[int, int, int] | None) -> tuple[int, int, int]:
    env = os.environ
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in env]
    if missing:
        given = ", ".join(
            f"{name}={env[name]}" for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in env
        )
        raise ValueError(
            f"{given} is set, {' and '.join(missing)} not: half a launcher's environment. {_START}, set all, "
            "or unset what is set to run alone"
        )
    rank, world = _number("RANK"), _number("WORLD_SIZE", 1)
    if rank >= world:
        raise ValueError(f"RANK={rank} of WORLD_SIZE={world}: ranks are 0 .. {world - 1}; {_START}")
    for name, other in (("SLURM_STEP_NUM_TASKS", step), ("MPI's size", mpi)):
        if other and world == 1 < other[1] and "TORCHELASTIC_RUN_ID" not in env:
            raise ValueError(
                f"WORLD_SIZE=1, but {name} is {other[1]}: each process would run alone in one folder; unset "
                "RANK and WORLD_SIZE"
            )
    local = "LOCAL_RANK" if "LOCAL_RANK" in env else "SLURM_LOCALID"
    return rank, world, _number(local) if local in env else 0


def _step() -> tuple[int, int, int] | None:
    """Place in an srun step. A batch script also has SLURM_PROCID; only inside a step do
    the other tasks exist.
    """
    env = os.environ
    if "SLURM_STEP_NUM_TASKS" not in env:
        step, tasks, task = (
            int(env[name]) if env.get(name, "").isdecimal() else 0
            for name in ("SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_PROCID")
        )
        # Above are SLURM's own steps, a batch script's among them
        in_step = "SLURM_STEP_ID" in env and step < 2**31
        if task > 0 or (in_step and tasks > 1):
            given = ", ".join(
                f"{name}={env[name]}" for name in ("SLURM_STEP_ID", "SLURM_PROCID") if name in env
            )
            raise ValueError(
                f"{given} is set, SLURM_STEP_NUM_TASKS not: half of srun's environment; {_START}, or unset "
                "it to run alone"
            )
    if "SLURM_STEP_ID" not in env or "SLURM_STEP_NUM_TASKS" not in env:
        return None
    return _complete("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "srun's")


def _mpi(step: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
    """Place among the processes of an mpirun; None without one, and where the variables
    are those of an srun that speaks MPI's protocol.
    """
    env = os.environ
    for size, rank, local in _MPI:
        if size in env or rank in env:
            found = _complete(size, rank, local, "MPI's")
            if found[1] == 1 or (step and found[:2] == step[:2]):
                return None
            if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
                raise ValueError(
                    f"{size}={found[1]}: this is one of several processes of mpirun, which does not say "
                    f"where rank 0 is; give it -x MASTER_ADDR=HOST -x MASTER_PORT=29500, or {_START} "
                    "(`mpirun -n 1` runs alone)"
                )
            return found
    if "PMIX_RANK" in env and not step:
        raise ValueError(
            f"PMIX_RANK={env['PMIX_RANK']} is set and no number of processes: {_START}, or unset PMIX_RANK "
            "to run alone"
        )
    return None


def _complete(size: str, rank: str, local: str, whose: str) -> tuple[int, int, int]:
    for name in (size, rank):
        if name not in os.environ:
            given = rank if name == size else size
            raise ValueError(
                f"{given}={os.environ[given]} is set, {name} not: half of {whose} environment; {_START}, or "
                "unset it to run alone"
            )
    found = _number(rank), _number(size, 1), _number(local) if local in os.environ else 0
    if found[0] >= found[1]:
        raise ValueError(f"{rank}={found[0]} of {size}={found[1]}: ranks are 0 .. {found[1] - 1}; {_START}")
    return found


def _number(name: str, least: int = 0) -> int:
    text = os.environ[name].strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        raise ValueError(
            f"{name}={os.environ[name]!r}: must be a whole number of at least {least}; {_START}, or unset it "
            "to run alone"
        )
    return int(text)


def meeting_point() -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT, which are set where SLURM lets them be found."""
    env = os.environ
    if not env.get("MASTER_ADDR"):
        env["MASTER_ADDR"] = _first_slurm_host()
    # A port of the job step's own, so that two jobs, or two steps of one job, sharing a
    # node do not meet; below the ephemeral ports.
    job, step = (
        int(env[name]) if env.get(name, "").isdecimal() else 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")
    )
    env["MASTER_PORT"] = env.get("MASTER_PORT") or str(12000 + (job * 64 + step) % 20000)
    port = _number("MASTER_PORT", 1)
    if port > 65535:
        raise ValueError(f"MASTER_PORT={port}: ports are 1 .. 65535; give a free one")
    return env["MASTER_ADDR"], port


def _first_slurm_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        raise ValueError(
            f"MASTER_ADDR is not set and there is no SLURM node list; {_START}, or set MASTER_ADDR and "
            "MASTER_PORT"
        )
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        return listed.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ValueError(
            f"MASTER_ADDR is not set and `scontrol show hostnames {nodes}` does not answer ({error}); set "
            "MASTER_ADDR"
        ) from error


def check_host_and_port(
    address: str, port: int, rank: int, seconds: float, unreachable: float = UNREACHABLE
) -> None:
    """On rank 0: whether the port is free; on others: waits until rank 0 answers there.

    Args:
        seconds: how long rank 0 may take to come, once its machine answers.

    Raises:
        ValueError: naming the address, within `unreachable` seconds if its machine does
            not answer.
    """
    where = f"MASTER_ADDR={address}, MASTER_PORT={port}"
    if rank == 0:
        _check_free(port, where)
    began = time.monotonic()
    while True:
        try:
            with socket.create_connection((address, port), timeout=10):
                return
        except ConnectionRefusedError as error:
            if rank == 0:
                return  # this machine's, and nobody listens yet
            failure, limit = error, seconds
        except OSError as error:
            failure, limit = error, min(seconds, unreachable)
        if time.monotonic() - began > limit:
            raise ValueError(
                f"{where}: rank 0 is not found there ({failure}); set MASTER_ADDR to the machine of rank 0, "
                "or unset it to run alone"
            )
        time.sleep(0.5)


def _check_free(port: int, where: str) -> None:
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            taken = "the port is taken by another process" if error.errno == errno.EADDRINUSE else str(error)
            raise ValueError(f"{where}: {taken}; give another MASTER_PORT, the same on all ranks") from error
