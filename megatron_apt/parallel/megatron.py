"""What models take from Megatron-Core while they run, imported at the first call.

Importing Megatron-Core takes a second, which a model that is built for its shapes alone
(on the meta device) saves.
"""

import importlib
from collections.abc import Callable
from typing import Any


def _late(module: str, name: str) -> Callable[..., Any]:
    def call(*args, **kwargs):
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


_MAPPINGS = "megatron.core.tensor_parallel.mappings"

all_to_all = _late(_MAPPINGS, "all_to_all")
checkpoint = _late("megatron.core.tensor_parallel", "checkpoint")
copy_to_tensor_model_parallel_region = _late(_MAPPINGS, "copy_to_tensor_model_parallel_region")
gather_from_sequence_parallel_region = _late(_MAPPINGS, "gather_from_sequence_parallel_region")
scatter_to_sequence_parallel_region = _late(_MAPPINGS, "scatter_to_sequence_parallel_region")
