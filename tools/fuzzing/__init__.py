"""Damaged and hostile inputs for every boundary of the package, and what becomes of each; see tools/fuzz.py."""

from fuzzing.boundary import Boundary
from fuzzing.datasets import DATASETS, ENCODINGS
from fuzzing.folders import FOLDERS
from fuzzing.pictures import PICTURES
from fuzzing.videos import VIDEOS

BOUNDARIES: dict[str, Boundary] = {boundary.name: boundary for boundary in (PICTURES, VIDEOS, FOLDERS, DATASETS, ENCODINGS)}
