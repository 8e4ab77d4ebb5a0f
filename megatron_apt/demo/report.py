"""The report of a run: one HTML file with pictures, clips, curves and numbers inside it,
readable from the first finished stage on.

Pictures come first, then quality, then curves; machine and times last.
"""

import base64
import math
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import torch.nn.functional as F
from torch import Tensor

from megatron_apt.demo import findings, plots
from megatron_apt.demo.content import APT, CONSISTENCY, DIFFUSION, FLOOR, METHODS, REAL, Report, Row, Section
from megatron_apt.demo.machine import described
from megatron_apt.demo.strip import description, strip
from megatron_apt.files import write_product
from megatron_apt.sample.media import gif_bytes, png_bytes

_CELL = 132  # CSS pixels for all samples of one prompt by one method
_LARGEST = 320  # stored pixels of a sample's longer side; larger ones are averaged down
_LEAD = """A diffusion model needs dozens of network evaluations for one sample. Consistency
distillation makes a copy that needs one, adversarial post-training (APT) then trains that
copy against real data. Below are samples of each for the same prompts and from the same noise."""
_TRIAL = """<b>Trial run.</b> A twentieth of the training, and few samples measured: it shows
that everything runs. Its samples are expected to look unfinished, and its figures say
nothing about the method."""
_HOW = (
    (
        "Stage 0 · Diffusion",
        "The network learns to point from a noisy sample towards the clean one. A sample follows that arrow "
        "in 25 small steps; in one big step it lands at the average of everything it could become.",
    ),
    (
        "Stage 1 · Consistency distillation",
        "A copy learns to land in one step where the guided diffusion model is heading, from every noise "
        "level. It serves as the start of stage 2.",
    ),
    (
        "Stage 2 · Adversarial post-training",
        "The generator now trains against a discriminator made from the diffusion model itself, which "
        "compares its samples with real data rather than with a teacher.",
    ),
    (
        "Ablation · Without aR1",
        "aR1 penalises a discriminator whose verdict changes when real data gets a little noise, which keeps "
        "it from winning outright. The last stage is trained once more without it.",
    ),
)
_TABLE_CAPTION = """Fréchet distance: how far the samples' distribution is from the data's,
lower is better; “real against real” is the floor that random halves of the data reach.
Class accuracy: share of samples in which a classifier trained on real data sees what the
prompt says. Diversity: mean distance between pairs of samples, near zero after a
collapse. NFE: network evaluations per sample."""
_SAMPLES_CAPTION = "Samples of one row and place share prompt and seed; “real” shows data with that caption."


def write_report(path: str | Path, report: Report) -> None:
    """Write `report` as one self-contained HTML file, atomically, so that a browser can
    reload it while the run goes on.
    """
    write_product(path, render(report))


def render(report: Report) -> str:
    parts = [f'<p class="lead">{_LEAD}</p>', *_state(report), *_pictures(report)]
    parts += [*_quality(report), *_curves(report), _how(), *_notes(report), *_run(report)]
    template = Template(files("megatron_apt.demo").joinpath("report.html.template").read_text("utf-8"))
    return template.substitute(title=escape(report.title), body="\n".join(parts))


# --- the parts of the page


def _state(report: Report) -> Iterator[str]:
    """Whether it is whole, and a trial."""
    if report.trial:
        yield f'<p class="banner">{_TRIAL}</p>'
    if report.pending:
        yield "<p>The run is not finished; this page is rewritten after every stage.</p>"


def _pictures(report: Report) -> Iterator[str]:
    for section in report.sections:
        yield f"<h2>{escape(section.name.capitalize())}</h2>"
        yield from _strip(section, report.trial)
        if section.grids:
            yield from _expected(section, report.trial)
            yield _samples(section, report.pending)
        else:
            yield (
                '<p class="quiet">Nothing to show yet: the first pictures come with the end of the '
                "diffusion stage.</p>"
            )


def _strip(section: Section, trial: bool) -> Iterator[str]:
    if found := strip(section, trial):
        data, kind = found
        source, words = f"data:image/{kind};base64,{base64.b64encode(data).decode()}", description(section)
        yield f'<p class="strip"><img src="{source}" alt="{escape(words)}"></p>'


def _expected(section: Section, trial: bool) -> Iterator[str]:
    """What to look for; figures of a trial say nothing."""
    if found := [] if trial else findings.of_samples(section.rows):
        yield f"<h3>What to look for</h3>{_list(found)}"


def _list(sentences: list[str] | tuple[str, ...]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _quality(report: Report) -> Iterator[str]:
    measured = [section for section in report.sections if section.table]
    if not measured:
        return
    yield "<h2>Quality and cost</h2>"
    for section in measured:
        yield f"<h3>{escape(section.name.capitalize())}</h3>"
        yield from _headline(section.rows)
        yield _table(section.table)
    yield f'<p class="quiet">{_TABLE_CAPTION}</p>'


def _curves(report: Report) -> Iterator[str]:
    drawn = [part for section in report.sections for part in (*_ablation(section), *_training(section))]
    if drawn:
        yield "<h2>Training</h2>"
        yield from drawn


def _how() -> str:
    cards = "".join(f'<div class="card"><h4>{title}</h4><p>{text}</p></div>' for title, text in _HOW)
    return f'<h2>How it works</h2><div class="cards">{cards}</div>'


def _notes(report: Report) -> Iterator[str]:
    if report.notes:
        yield f"<h2>Notes</h2>{_list(report.notes)}"


def _run(report: Report) -> Iterator[str]:
    """Where it ran, how long each stage took, and its configuration."""
    if report.machine or report.seconds or report.pending:
        yield "<h2>This run</h2>"
    if report.machine:
        yield f"<p>{escape(described(report.machine))}</p>"
    yield _stages(report)
    if report.config_text:
        yield f"<details><summary>Configuration</summary><pre>{escape(report.config_text)}</pre></details>"


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
    return f'<ul class="stages">{"".join(items)}</ul>' if items else ""


def _headline(rows: dict[str, Row]) -> Iterator[str]:
    """Up to three numbers that say whether the method worked, once APT's row is there."""
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
        f'<div class="scroll"><table class="samples"><thead><tr><th>prompt</th>{head}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div><p class="quiet">{_SAMPLES_CAPTION}</p>'
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
        f'<div class="scroll"><table class="numbers"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _ablation(section: Section) -> Iterator[str]:
    adversarial = [rows for rows in section.curves.values() if plots.line(rows, "d/loss", "")]
    regularised = adversarial[-1] if adversarial else []
    plot = plots.ablation_plot(regularised, section.ablation)
    if plot is None:
        return
    yield "<h3>With and without aR1</h3>"
    yield _list(findings.of_ablation(regularised, section.ablation, section.rows))
    yield _figure(plot, f"{section.name}-ablation")


def _training(section: Section) -> Iterator[str]:
    for stage, rows in section.curves.items():
        drawn = plots.stage_plots(rows)
        if drawn:
            figures = "".join(_figure(plot, f"{section.name}-{stage}-{i}") for i, plot in enumerate(drawn))
            yield f"<h3>{escape(section.name.capitalize())} · {escape(stage)}</h3>"
            yield f'<div class="plots">{figures}</div>'


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
