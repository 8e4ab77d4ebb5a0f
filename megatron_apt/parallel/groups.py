"""Process groups of a mesh: those that are used, each made by its members alone.

Megatron-Core lets every rank of the world take part in making every group there is, used or not: 4,000
to 7,000 calls on 1,024 ranks, each of which waits for all of them. Here a rank makes its own, seven at most.
"""

import contextlib
from collections.abc import Generator, Sequence
from types import ModuleType
from typing import Any

import torch.distributed as dist

# As Megatron-Core describes them
_AXES = ("TENSOR_MODEL_", "CONTEXT_", "PIPELINE_MODEL_", "DATA_", "HIERARCHICAL_")
_STAGE = "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP"


@contextlib.contextmanager
def members_only(parallel_state: ModuleType, stages: int) -> Generator[None]:
    """While `parallel_state.initialize_model_parallel` runs: of each group that an axis of the mesh
    is made of, a rank makes its own. Others are one of these where they are of the same ranks, else
    they are not made, and Megatron-Core says so where one is asked for.

    All ranks go through the groups in one order, so members that wait for each other do not lock.

    Args:
        stages: of the pipeline; with one, a stage is the world.
    """
    create = parallel_state.create_group
    made: dict[tuple, Any] = {}

    def create_own(
        ranks: Sequence[int],
        timeout: Any = None,
        backend: str | None = None,
        pg_options: Any = None,
        use_local_synchronization: bool = False,
        group_desc: str | None = None,
    ) -> Any:
        if dist.get_rank() not in ranks:
            return None
        name = str(group_desc)
        used = name.startswith(_AXES) or (name == _STAGE and stages > 1)
        # Alone a rank has one group, whatever it stands for
        key = tuple(ranks), backend, name if used and len(ranks) > 1 else ""
        if key not in made:
            if not used and len(ranks) > 1:
                return next((made[other] for other in made if other[:2] == key[:2]), None)
            made[key] = create(ranks, timeout, backend, pg_options, True, group_desc)
        return made[key]

    parallel_state.create_group = create_own  # ty: ignore[missing-attribute]
    try:
        yield
    finally:
        parallel_state.create_group = create  # ty: ignore[missing-attribute]
