"""`megatron-apt examples`: the recipes, batch scripts and tools that come with the
package, copied into a folder of the user's.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

FOLDERS = ("examples", "tools")


@dataclass(frozen=True)
class ExamplesConfig:
    """Settings of `megatron-apt examples`."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = "."
    """Gets examples/ (recipes, and the batch script for SLURM) and tools/; it is made if
    it is not there. Nothing is overwritten.
    """


def copy_examples(config: ExamplesConfig) -> list[Path]:
    """Copies every file, or none, and says what was written.

    Raises:
        ValueError: a file is there already; names it and the remedy.
        OSError: the folder cannot be written to.
    """
    copies = {Path(config.folder) / name: file for name, file in _shipped().items()}
    there = [str(target) for target in copies if os.path.lexists(target)]
    if there:
        raise ValueError(
            f"{there[0]} is there already ({len(there)} of {len(copies)} files are); nothing was written. "
            "Give another folder: megatron-apt examples FOLDER"
        )
    for target, file in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb") as stream:
            stream.write(file.read_bytes())
    recipes = Path(config.folder, "examples")
    print(f"{len(copies)} files in {recipes} and {Path(config.folder, 'tools')}")
    print(f"start one of the recipes: megatron-apt train {recipes / 'tiny.py'}:image_flow")
    return list(copies)


def _shipped() -> dict[Path, Path]:
    """Files by the name they get, such as examples/wan.py."""
    package = Path(__file__).parent
    # An installed package holds them; in a source tree they lie beside it
    root = package if (package / FOLDERS[0]).is_dir() else package.parent
    found = sorted(file for folder in FOLDERS for file in (root / folder).rglob("*") if file.is_file())
    if not found:
        raise ValueError(f"{root} holds no examples; install megatron_apt again")
    return {file.relative_to(root): file for file in found if file.parent.name != "__pycache__"}
