"""Damaged and hostile inputs for every boundary, and what becomes of each.

See tools/fuzz.py.
"""

from fuzzing.boundary import Boundary
from fuzzing.checkpoints import CHECKPOINTS
from fuzzing.commands import COMMANDS
from fuzzing.datasets import DATASETS, ENCODINGS
from fuzzing.folders import FOLDERS
from fuzzing.models import BASES, CONFIGS, TOKENIZERS, WEIGHTS
from fuzzing.pictures import PICTURES
from fuzzing.records import RECORDS
from fuzzing.videos import VIDEOS

_ALL = (
    PICTURES,
    VIDEOS,
    FOLDERS,
    DATASETS,
    ENCODINGS,
    CHECKPOINTS,
    CONFIGS,
    WEIGHTS,
    TOKENIZERS,
    BASES,
    COMMANDS,
    RECORDS,
)
BOUNDARIES: dict[str, Boundary] = {boundary.name: boundary for boundary in _ALL}
