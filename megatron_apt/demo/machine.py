"""Which machine a demo runs on, so that its figures and times can be told from another's."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TypedDict


class Machine(TypedDict):
    processor: str
    cores: int
    accelerator: str
    """Name of the GPU; empty without one."""
    system: str
    versions: dict[str, str]
    """Of Python and of the libraries that figures depend on."""
    date: str
    """ISO 8601: 2026-01-31."""


def this_machine() -> Machine:
    import torch  # a second to import

    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        system=f"{platform.system()} {platform.machine()}",
        versions={"Python": platform.python_version(), **versions},
        date=datetime.date.today().isoformat(),
    )


def _processor(listing: Path = Path("/proc/cpuinfo")) -> str:
    """Its name as Linux lists it; elsewhere what Python knows."""
    try:
        lines = listing.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, named), "") or platform.processor() or platform.machine()


def described(machine: Machine) -> str:
    """One line for people."""
    cores = f"{machine['cores']} core{'' if machine['cores'] == 1 else 's'}"
    parts = [f"{machine['processor']}, {cores}", machine["accelerator"], machine["system"]]
    parts += [f"{name} {version}" for name, version in machine["versions"].items()]
    return " · ".join([*filter(None, parts), machine["date"]])
