"""Checks the types of the package, its tools and its examples.

    python tools/check_types.py

`kernels/` is installed as `megatron_apt.kernels`, which a type checker cannot know. So the
files are checked in a copy that is laid out as the installed package is. Settings are in
pyproject.toml.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_apt import scripts

ROOT = Path(__file__).resolve().parents[1]
CHECKER = Path(sys.executable).parent / "ty"
PLACES = {  # in the copy, by what is copied
    "megatron_apt": "megatron_apt",
    "kernels": "megatron_apt/kernels",
    "tools": "tools",
    "examples": "examples",
    "tests": "tests",  # not checked, but some benchmarks borrow from it
    "pyproject.toml": "pyproject.toml",
}


def copy(folder: Path) -> None:
    """Copies what is checked, laid out as it is installed."""
    for source, place in PLACES.items():
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, folder / place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, folder / place)


def main() -> int:
    """Exit code of the checker; its messages name the files as they lie here."""
    with tempfile.TemporaryDirectory() as name:
        copy(Path(name))
        command = [CHECKER, "check", "--python", sys.prefix, "--output-format", "concise"]
        done = subprocess.run(command, cwd=name, capture_output=True, text=True)
    print(done.stdout.replace("megatron_apt/kernels/", "kernels/") + done.stderr, end="")
    return done.returncode


if __name__ == "__main__":
    scripts.run(main)
