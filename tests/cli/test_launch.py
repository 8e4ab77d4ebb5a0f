"""Start-up: every launcher's environment, halves of them, and addresses where nobody answers."""

import socket

import pytest

from megatron_apt.parallel import launcher
from megatron_apt.parallel.launcher import placement

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
HYDRA = {"PMI_SIZE": "2", "PMI_RANK": "1"}
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """environment(variables): these, and none other of a launcher."""

    def given(variables):
        for name in [*launcher.os.environ]:
            if (
                name.startswith(("SLURM_", "OMPI_", "PMI", "MPI_", "MV2_", "MASTER_", "TORCHELASTIC"))
                or name in TORCHRUN
            ):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return given


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, 0)),  # a batch script
        ({"WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"MASTER_ADDR": "gone.invalid", "MASTER_PORT": "1"}, (0, 1, 0)),
        (TORCHRUN, (3, 4, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "SLURM_LOCALID": "2"}, (3, 4, 2)),
        (STEP, (2, 4, 1)),
        (STEP | {"PMI_SIZE": "4", "PMI_RANK": "2"}, (2, 4, 1)),  # srun --mpi=pmi2
        (STEP | {"PMIX_RANK": "2"}, (2, 4, 1)),
        (STEP | TORCHRUN, (3, 4, 1)),
        (OPEN_MPI | MEETING, (1, 2, 1)),
        (HYDRA | MEETING, (1, 2, 0)),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, (0, 1, 0)),
    ],
)
def test_whole_environments_give_a_place(environment, variables, place):
    environment(variables)
    assert placement() == place


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE=2 is set, RANK not.*torchrun or srun.*unset"),
        (
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
            r"SLURM_STEP_ID=0, SLURM_PROCID=0 is set, SLURM_STEP_NUM_TASKS not",
        ),
        ({"SLURM_PROCID": "1"}, r"SLURM_PROCID=1 is set, SLURM_STEP_NUM_TASKS not"),
        ({"RANK": "1"}, r"RANK=1 is set, WORLD_SIZE not"),
        ({"LOCAL_RANK": "0"}, r"LOCAL_RANK=0 is set, RANK and WORLD_SIZE not"),
        (TORCHRUN | {"RANK": "4"}, r"RANK=4 of WORLD_SIZE=4: ranks are 0 \.\. 3"),
        (TORCHRUN | {"RANK": "-1"}, r"RANK='-1'"),
        (TORCHRUN | {"RANK": ""}, r"RANK=''"),
        (TORCHRUN | {"WORLD_SIZE": "four"}, r"WORLD_SIZE='four'.*whole number of at least 1"),
        (TORCHRUN | {"LOCAL_RANK": "1.5"}, r"LOCAL_RANK='1\.5'"),
        ({"RANK": "0", "WORLD_SIZE": "1"} | STEP, r"WORLD_SIZE=1, but SLURM_STEP_NUM_TASKS is 4"),
        (OPEN_MPI, r"OMPI_COMM_WORLD_SIZE=2.*-x MASTER_ADDR=HOST"),
        (HYDRA, r"PMI_SIZE=2"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, r"OMPI_COMM_WORLD_SIZE=2 is set, OMPI_COMM_WORLD_RANK not"),
        ({"PMI_RANK": "1"}, r"PMI_RANK=1 is set, PMI_SIZE not"),
        ({"PMIX_RANK": "0"}, r"PMIX_RANK=0"),
        ({"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "0"}, r"MV2_COMM_WORLD_SIZE=2"),
        (
            {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            r"SLURM_STEP_NUM_TASKS=2 is set, SLURM_PROCID not",
        ),
    ],
)
def test_half_an_environment_is_refused_by_name(environment, variables, named):
    environment(variables)
    with pytest.raises(ValueError, match=named):
        placement()


def test_a_taken_port_and_an_address_where_nobody_is_are_named(environment):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"MASTER_PORT={port}: the port is taken"):
            launcher.check_host_and_port("127.0.0.1", port, rank=0, seconds=1)
        launcher.check_host_and_port("127.0.0.1", port, rank=1, seconds=1)
    with pytest.raises(ValueError, match=r"MASTER_ADDR=127.0.0.1.*rank 0 is not found there .*refused"):
        launcher.check_host_and_port("127.0.0.1", port, rank=1, seconds=0)
    with pytest.raises(ValueError, match=r"MASTER_ADDR=gone\.invalid.*unset it to run alone"):
        launcher.check_host_and_port("gone.invalid", port, rank=1, seconds=100, unreachable=0)
    environment({"MASTER_ADDR": "x", "MASTER_PORT": "99999"})
    with pytest.raises(ValueError, match="MASTER_PORT=99999"):
        launcher.meeting_point()
