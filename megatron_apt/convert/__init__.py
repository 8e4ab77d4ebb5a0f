"""Hugging Face checkpoints in and out: one module per family, each a declarative map of
weights; nothing is read through pickle.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """What families.py defines, at its first use: it needs torch, and the options of the
    command line (command.py) are not to wait for that.
    """
    return getattr(importlib.import_module("megatron_apt.convert.families"), name)
