"""A message that every process of a launch would print is printed by one of each machine."""

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

_OLD = 86400.0  # seconds after which a claim is swept away


def say_once(message: str) -> str | int:
    """For sys.exit: the message where no other process of this launch on this machine has
    claimed it, else the code 1 alone.

    A launch is an srun step, or the children of one process: what cannot be told apart is
    printed too often rather than never.
    """
    env = os.environ
    if env.get("WORLD_SIZE", env.get("SLURM_STEP_NUM_TASKS", "1")) == "1":
        return message
    step = (
        [env.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")]
        if "SLURM_STEP_ID" in env
        else []
    )
    launch = step or [str(os.getppid()), _born(os.getppid())]
    name = hashlib.sha256(
        "\0".join([*launch, env.get("TORCHELASTIC_RESTART_COUNT", ""), message]).encode()
    ).hexdigest()[:32]
    folder = Path(tempfile.gettempdir())
    try:
        _sweep(folder, prefix := f"megatron-apt-said-{os.getuid()}-")
        os.close(os.open(folder / (prefix + name), os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
    except FileExistsError:
        return 1
    except OSError:
        pass  # nowhere to claim
    return message


def _born(pid: int) -> str:
    try:
        return (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()[19]
        )
    except (OSError, IndexError):
        return str(time.time() // 60)


def _sweep(folder: Path, prefix: str) -> None:
    for file in folder.glob(prefix + "*"):
        with contextlib.suppress(OSError):
            if time.time() - file.lstat().st_mtime > _OLD:
                file.unlink()
