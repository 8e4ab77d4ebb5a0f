"""Process groups at the size of a cluster, counted on ranks that are not there."""

import os
from collections import Counter

import pytest
import torch.distributed as dist

from megatron_apt.config import ParallelConfig
from megatron_apt.parallel import startup
from support.ranks import forks

MESHES = {
    "tp8-cp4-pp4": ParallelConfig(tp=8, cp=4, pp=4),
    "tp8-cp1-pp1": ParallelConfig(tp=8),
    "tp4-cp8-pp1": ParallelConfig(tp=4, cp=8),
    "tp1-cp1-pp1": ParallelConfig(),
    "tp2-cp2-pp16": ParallelConfig(tp=2, cp=2, pp=16),
}
MOST_CALLS = 7  # the axes, a stage, and a group of the rank alone


def count(parallel, world, every, answers) -> None:
    """For every so-many-th rank of the world: calls of new_group, and ranks it shares a group with."""
    try:
        from megatron.core import parallel_state
        from torch.testing._internal.distributed.fake_pg import FakeStore

        new_group, found, backends = dist.new_group, {}, Counter()
        for rank in range(0, world, every):
            calls: list[tuple[int, ...]] = []

            def counted(ranks=None, *args, calls=calls, **options):
                calls.append(tuple(ranks))
                backends[options.get("backend")] += 1
                assert options["use_local_synchronization"]
                return new_group(ranks, *args, **options)

            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
            dist.new_group = counted
            startup.lay(parallel_state, parallel)
            sizes = {
                "tp": parallel_state.get_tensor_model_parallel_world_size(),
                "cp": parallel_state.get_context_parallel_world_size(),
                "pp": parallel_state.get_pipeline_model_parallel_world_size(),
                "dp": parallel_state.get_data_parallel_world_size(),
                "dp_cp": parallel_state.get_data_parallel_world_size(with_context_parallel=True),
            }
            found[rank] = calls, sizes
            startup.stop()
            dist.new_group = new_group
        answers.put((found, backends))
    except BaseException as error:
        answers.put(error)
        raise


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("every", [61, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_rank_of_1024_makes_few_groups_and_only_its_own(name, every):
    context, parallel = forks(), MESHES[name]
    answers = context.Queue()
    process = context.Process(target=count, args=(parallel, 1024, every, answers))
    process.start()
    answer = answers.get(timeout=600)
    process.join()
    if isinstance(answer, BaseException):
        raise answer
    found, backends = answer
    assert len(found) == len(range(0, 1024, every)) and set(backends) == {None}
    dp = 1024 // (parallel.tp * parallel.cp * parallel.pp)
    for rank, (calls, sizes) in found.items():
        want = {"tp": parallel.tp, "cp": parallel.cp, "pp": parallel.pp, "dp": dp, "dp_cp": dp * parallel.cp}
        assert sizes == want
        assert len(calls) <= MOST_CALLS
        assert all(rank in ranks for ranks in calls)
        peers = {other for ranks in calls for other in ranks} - {rank}
        stage = 1024 // parallel.pp if parallel.pp > 1 else 0  # made where a stage is not the world
        line = parallel.tp + parallel.cp + parallel.pp + dp * parallel.cp
        assert len(peers) <= max(stage, line) + parallel.pp


@pytest.mark.parametrize(
    ("parallel", "given", "then"),
    [
        (ParallelConfig(tp=2), None, "1"),
        (ParallelConfig(tp=2), "8", "8"),
        (ParallelConfig(), None, None),
        (ParallelConfig(tp=2, pp=2), None, None),
        (ParallelConfig(tp=2, pp=2), "8", "8"),
    ],
)
def test_the_order_of_kernels_is_chosen_by_the_mesh(monkeypatch, parallel, given, then):
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(name, given)
    startup.choose_connections(parallel)
    assert os.environ.get(name) == then
    monkeypatch.delenv(name, raising=False)


def test_a_pipeline_whose_messages_would_wait_is_warned_of(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with pytest.warns(UserWarning, match=r"parallel\.pp=2 messages wait behind .*unset it"):
        startup.choose_connections(ParallelConfig(pp=2))
