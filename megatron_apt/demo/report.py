"""The report of a run: one HTML file with pictures, clips, curves and numbers inside it,
readable from the first finished stage on.
"""

import base64
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import torch.nn.functional as F
from torch import Tensor

from megatron_apt.demo import plots
from megatron_apt.files import write_product
from megatron_apt.sample.media import gif_bytes, png_bytes

# Names that grids and table rows should use: the page explains them, orders columns by
# them and takes its headline numbers from them.
REAL, DIFFUSION, DIFFUSION_1, CONSISTENCY, APT, APT_2 = METHODS = (
    "real",
    "diffusion 25 steps",
    "diffusion 1 step",
    "consistency 1 step",
    "APT 1 step",
    "APT 2 steps",
)
FLOOR = "real against real"

_CELL = 132  # CSS pixels for all samples of one prompt by one method
_LARGEST = 320  # stored pixels of a sample's longer side; larger ones are averaged down
_LEAD = """A diffusion model needs dozens of network evaluations for one sample. Adversarial
post-training turns it into a generator that needs one: in every row below, all columns
start from the same prompt and, where they start from noise, from the same noise."""
_HOW = (
    (
        "Stage 0 · Diffusion",
        "The network learns to point from a noisy sample towards the clean one. Following that arrow in 25 "
        "small steps gives good samples; one big step gives a blur.",
    ),
    (
        "Stage 1 · Consistency distillation",
        "A copy learns to land in one step where the guided diffusion model is heading, from every noise "
        "level. The result is usable but soft, and serves only as the start of stage 2.",
    ),
    (
        "Stage 2 · Adversarial post-training",
        "The generator now trains against a discriminator made from the diffusion model itself, which "
        "compares its samples with real data rather than with a teacher. That restores detail, and can "
        "surpass the teacher in sharpness.",
    ),
    (
        "Ablation · Without aR1",
        "aR1 penalises a discriminator whose verdict changes when real data gets a little noise. Without it "
        "the discriminator wins outright, its loss falls to zero and the generator learns nothing more.",
    ),
)
_TABLE_CAPTION = """Fréchet distance: how far the samples' distribution is from the data's,
lower is better; “real against real” is the floor that random halves of the data reach.
Class accuracy: share of samples in which a classifier trained on real data sees what the
prompt says. Diversity: mean distance between pairs of samples, near zero after a
collapse. NFE: network evaluations per sample."""
_SAMPLES_CAPTION = "Samples of one row and place share prompt and seed; “real” shows data with that caption."


@dataclass(frozen=True)
class Row:
    """One line of a table; NaN is shown as a dash. Name it FLOOR or one of METHODS where that fits."""

    name: str
    frechet: float
    accuracy: float
    diversity: float
    nfe: float
    seconds_per_sample: float


@dataclass(frozen=True)
class Section:
    """Images or videos. Cell i of every grid, (N, 3, F, H, W) in [-1, 1], shows
    prompts[i]; repeated prompts (other seeds) share a line.

    curves: stage -> rows of its JSONL log; ablation: rows of the log without aR1.
    Everything may be empty or partly there.
    """

    name: str
    prompts: tuple[str, ...] = ()
    grids: dict[str, Tensor] = field(default_factory=dict)
    fps: float = 8.0
    table: tuple[Row, ...] = ()
    curves: dict[str, list[dict]] = field(default_factory=dict)
    ablation: list[dict] = field(default_factory=list)

    def __post_init__(self):
        for name, grid in self.grids.items():
            if grid.ndim != 5 or grid.shape[1] != 3 or len(grid) != len(self.prompts):
                raise ValueError(
                    f"grid {name!r} of {self.name} is {tuple(grid.shape)}; need ({len(self.prompts)} "
                    "prompts, 3, F, H, W)"
                )


@dataclass(frozen=True)
class Report:
    """seconds: finished stage -> duration, in order; pending: stages still to come."""

    title: str
    sections: tuple[Section, ...]
    seconds: dict[str, float]
    config_text: str
    notes: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()


def write_report(path: str | Path, report: Report) -> None:
    """Write `report` as one self-contained HTML file, atomically, so that a browser can
    reload it while the run goes on.
    """
    write_product(path, render(report))


def render(report: Report) -> str:
    parts = [f'<p class="lead">{_LEAD}</p>', _stages(report), _how()]
    for section in report.sections:
        parts += _section(section, report.pending)
    if report.notes:
        parts.append(
            "<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in report.notes) + "</ul>"
        )
    if report.config_text:
        parts.append(
            f"<details><summary>Configuration</summary><pre>{escape(report.config_text)}</pre></details>"
        )
    template = Template(files(__package__).joinpath("report.html.template").read_text(encoding="utf-8"))
    return template.substitute(title=escape(report.title), body="\n".join(parts))


# --- the parts of the page


def _stages(report: Report) -> str:
    longest = max(report.seconds.values(), default=1.0) or 1.0
    items = [
        f'<li><span>{escape(name)}</span><span class="bar" '
        f'style="width:{100 * seconds / longest:.1f}%"></span><time>{_duration(seconds)}</time></li>'
        for name, seconds in report.seconds.items()
    ]
    if items:
        total = _duration(sum(report.seconds.values()))
        items.append(f'<li class="total"><span>Total</span><span></span><time>{total}</time></li>')
    items += [
        f'<li class="pending"><span>{escape(name)}</span><span class="bar"></span><time>still to '
        "come</time></li>"
        for name in report.pending
    ]
    running = (
        "<p>The run is not finished; this page is rewritten after every stage.</p>" if report.pending else ""
    )
    return f'{running}<ul class="stages">{"".join(items)}</ul>' if items else running


def _how() -> str:
    cards = "".join(f'<div class="card"><h4>{title}</h4><p>{text}</p></div>' for title, text in _HOW)
    return f'<h2>How it works</h2><div class="cards">{cards}</div>'


def _section(section: Section, pending: tuple[str, ...]) -> Iterator[str]:
    yield f"<h2>{escape(section.name.capitalize())}</h2>"
    yield from _headline(section.table)
    if section.grids:
        yield _samples(section, pending)
    if section.table:
        yield "<h3>Quality and cost</h3>" + _table(section.table)
    if section.ablation:
        yield from _ablation(section)
    if section.curves:
        yield from _curves(section)
    if not (section.grids or section.table or section.curves):
        yield (
            '<p class="quiet">Nothing to show yet: the first pictures come with the end of the diffusion '
            "stage.</p>"
        )


def _headline(table: tuple[Row, ...]) -> Iterator[str]:
    """Up to three numbers that say whether the method worked, once APT's row is there."""
    rows = {row.name: row for row in table}
    if APT not in rows:
        return
    apt, tiles = rows[APT], []
    if CONSISTENCY in rows and math.isfinite(ratio := apt.frechet / (rows[CONSISTENCY].frechet or math.nan)):
        tiles.append((f"{ratio:.2f} ×", "the Fréchet distance of consistency distillation, both in one step"))
    if DIFFUSION in rows and math.isfinite(apt.nfe) and math.isfinite(rows[DIFFUSION].nfe):
        tiles.append(
            (f"{rows[DIFFUSION].nfe:.0f} → {apt.nfe:.0f}", "network evaluations per sample, diffusion → APT")
        )
    if math.isfinite(apt.accuracy):
        tiles.append((f"{100 * apt.accuracy:.1f} %", "of APT's one-step samples show what the prompt says"))
    if tiles:
        yield (
            '<div class="cards">'
            + "".join(f'<div class="card tile"><b>{value}</b><p>{text}</p></div>' for value, text in tiles)
            + "</div>"
        )


def _samples(section: Section, pending: tuple[str, ...]) -> str:
    # While stages are to come their columns stand empty: the page then keeps its shape
    # from rewrite to rewrite.
    names = [name for name in METHODS if name in section.grids or pending] + [
        name for name in section.grids if name not in METHODS
    ]
    cells: dict[str, list[int]] = {}
    for index, prompt in enumerate(section.prompts):
        cells.setdefault(prompt, []).append(index)
    width = max(24, _CELL // max(len(indices) for indices in cells.values()) - 4)
    mark = {REAL: ' class="reference"'}
    head = "".join(f"<th{mark.get(name, '')}>{escape(name)}</th>" for name in names)
    lines = []
    for prompt, indices in cells.items():
        row = "".join(
            f"<td{mark.get(name, '')}>{_cell(section, name, indices, min(width, 84))}</td>" for name in names
        )
        lines.append(f"<tr><th>{escape(prompt)}</th>{row}</tr>")
    return (
        f'<div class="scroll"><table class="samples"><caption>{_SAMPLES_CAPTION}</caption>'
        f"<thead><tr><th>prompt</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(section: Section, name: str, indices: list[int], width: int) -> str:
    if name not in section.grids:
        return '<span class="quiet">·</span>'
    images = "".join(
        _image(section.grids[name][i], section.fps, width, f"{section.prompts[i]}, {name}") for i in indices
    )
    return f'<span class="cell{" pair" if len(indices) <= 2 else ""}">{images}</span>'


def _image(sample: Tensor, fps: float, width: int, description: str) -> str:
    """(3, F, H, W) as a picture or clip about `width` CSS pixels wide, stored enlarged by a whole factor."""
    height_stored, width_stored = sample.shape[-2:]
    if (largest := max(height_stored, width_stored)) > _LARGEST:
        size = [max(1, round(side * _LARGEST / largest)) for side in (height_stored, width_stored)]
        sample = F.interpolate(sample.float().transpose(0, 1), size, mode="area").transpose(0, 1)
    scale = max(1, round(width / sample.shape[-1]))
    clip = sample.shape[1] > 1
    data = gif_bytes(sample[None], fps, 1, scale) if clip else png_bytes(sample[None, :, 0], 1, scale)
    shown = scale * sample.shape[-1] if scale > 1 else min(width, sample.shape[-1])
    source = f"data:image/{'gif' if clip else 'png'};base64,{base64.b64encode(data).decode()}"
    return f'<img src="{source}" width="{shown}" alt="{escape(description)}" title="{escape(description)}">'


def _table(table: tuple[Row, ...]) -> str:
    longest = max((row.frechet for row in table if math.isfinite(row.frechet)), default=1.0) or 1.0
    lines = []
    for row in table:
        bar = (
            f'<i style="width:{120 * row.frechet / longest:.0f}px"></i>' if math.isfinite(row.frechet) else ""
        )
        reference = ' class="reference"' if row.name in (REAL, FLOOR) else ""
        lines.append(
            f"<tr{reference}><th>{escape(row.name)}</th>"
            f'<td class="fd"><span>{_number(row.frechet)}</span>{bar}</td>'
            f"<td>{_number(row.accuracy)}</td><td>{_number(row.diversity)}</td>"
            f"<td>{_number(row.nfe, 0)}</td><td>{_per_sample(row.seconds_per_sample)}</td></tr>"
        )
    head = (
        '<th>method</th><th class="fd">Fréchet distance ↓</th><th>class accuracy '
        "↑</th><th>diversity</th><th>NFE</th><th>time per sample</th>"
    )
    return (
        f'<div class="scroll"><table class="numbers"><caption>{_TABLE_CAPTION}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _ablation(section: Section) -> Iterator[str]:
    adversarial = [rows for rows in section.curves.values() if plots.line(rows, "d/loss", "")]
    regularised = adversarial[-1] if adversarial else []
    plot = plots.ablation_plot(regularised, section.ablation)
    if plot is None:
        return
    yield "<h3>What aR1 is for</h3>"
    ends = [
        (name, plots.tail_median(rows, "d/loss"))
        for name, rows in (("with aR1", regularised), ("without aR1", section.ablation))
    ]
    ends = " and ".join(f"{_number(value)} {name}" for name, value in ends if math.isfinite(value))
    yield f"<p>The discriminator’s loss ends at {ends} (median of the last tenth of the updates).</p>"
    yield _figure(plot, f"{section.name}-ablation")


def _curves(section: Section) -> Iterator[str]:
    for stage, rows in section.curves.items():
        drawn = plots.stage_plots(rows)
        if drawn:
            figures = "".join(_figure(plot, f"{section.name}-{stage}-{i}") for i, plot in enumerate(drawn))
            yield f'<h3>Training · {escape(stage)}</h3><div class="plots">{figures}</div>'


def _figure(plot: plots.Plot, name: str) -> str:
    legend = "".join(
        f'<span class="key k{i}">{escape(data.label)}</span>' for i, data in enumerate(plot.lines, 1)
    )
    name = "".join(letter if letter.isalnum() else "-" for letter in name)
    return (
        f"<figure{' class=wide' if plot.wide else ''}><figcaption><b>{escape(plot.title)}</b>"
        f"<span>{legend if len(plot.lines) > 1 else ''}</span></figcaption>{plots.svg(plot, name)}</figure>"
    )


# --- numbers as text


def _number(value: float, decimals: int = 3) -> str:
    return f"{value:.{decimals}f}" if math.isfinite(value) else "–"


def _per_sample(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
