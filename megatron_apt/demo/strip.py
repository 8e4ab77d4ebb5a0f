"""The strip: what the stages make of the same prompts and noise, side by side, as one
picture that fits a page. Pictures as PNG, clips as an animated GIF.
"""

import io

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from megatron_apt.demo.content import APT, CONSISTENCY, DIFFUSION, REAL, Section
from megatron_apt.sample.media import gif_of, grid_frames

PANELS = {REAL: "real", DIFFUSION: "25 steps", CONSISTENCY: "consistency", APT: "APT"}
TRIAL = "trial run: a twentieth of the training"
_CELLS = 20  # of a panel at most
_SIDE = 250  # pixels of a panel's width, about: four of them and their gaps fit a page
_GAP, _LABEL = 20, 44  # pixels between panels, and above them
_INK, _PAPER, _QUIET = (28, 30, 34), 255, (98, 103, 111)


def strip(section: Section, trial: bool = False) -> tuple[bytes, str] | None:
    """The strip of a section's samples and its kind, png or gif; None before the diffusion
    stage is measured.

    Args:
        trial: says so below the panels.
    """
    if DIFFUSION not in section.grids:
        return None
    frames = _framed(section, trial)
    if len(frames) > 1:
        return gif_of(frames, section.fps), "gif"
    data = io.BytesIO()
    Image.fromarray(frames[0]).save(data, "png", optimize=True)
    return data.getvalue(), "png"


def description(section: Section) -> str:
    """Of the strip, for those who do not see it."""
    return f"The same samples side by side: {', '.join(name for name in PANELS if name in section.grids)}"


def _framed(section: Section, trial: bool) -> np.ndarray:
    """(F, height, width, 3): the panels that there are, each under its label."""
    names = [name for name in PANELS if name in section.grids]
    panels = [_panel(section, name) for name in names]
    count, height, width, _ = panels[0].shape
    total = len(panels) * (width + _GAP) - _GAP
    canvas = np.full((count, _LABEL + height + (_LABEL if trial else 0), total, 3), _PAPER, np.uint8)
    for i, panel in enumerate(panels):
        left = i * (width + _GAP)
        canvas[:, _LABEL : _LABEL + height, left : left + width] = panel
        canvas[:, :_LABEL, left : left + width] = _text(PANELS[names[i]], width, 32, _INK)
    if trial:
        canvas[:, _LABEL + height :] = _text(TRIAL, total, 24, _QUIET)
    return canvas


def _panel(section: Section, name: str) -> np.ndarray:
    """(F, height, width, 3): a grid of one method's samples, each in a black frame of one
    of its pixels, which sets strokes that touch its edge off from its neighbour's.
    """
    samples = F.pad(section.grids[name][_chosen(section.prompts)].float(), (1, 1, 1, 1), value=-1)
    wide, high = samples.shape[-1], samples.shape[-2]
    columns = 5 if wide <= high else 2
    return grid_frames(samples, columns, max(1, _SIDE // (columns * wide)))


def _chosen(prompts: tuple[str, ...]) -> list[int]:
    """Cells that are shown: the first samples of all prompts in order, then their second
    ones, as many as a panel has. Of more than ten prompts, which come in pairs (to the
    left, to the right), one of each pair in turns.
    """
    cells: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        cells.setdefault(prompt, []).append(i)
    lines = list(cells.values())
    if len(lines) > 10:
        return [line[0] for i, line in enumerate(lines) if i % 4 in (0, 3)][:10]
    rounds = max(len(line) for line in lines)
    return [line[seed] for seed in range(rounds) for line in lines if seed < len(line)][:_CELLS]


def _text(words: str, width: int, size: int, ink: tuple[int, int, int]) -> np.ndarray:
    """(_LABEL, width, 3): words in the middle."""
    picture = Image.new("RGB", (width, _LABEL), (_PAPER,) * 3)
    font = ImageFont.load_default(size)
    ImageDraw.Draw(picture).text((width / 2, _LABEL / 2), words, fill=ink, font=font, anchor="mm")
    return np.asarray(picture)
