"""Curves as inline SVG whose colours are CSS variables, so that one drawing serves the
light and the dark page.
"""

import io
import math
import re
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

# matplotlib wants real colours; these stand for CSS variables and are replaced in the SVG text.
_STAND_INS = {f"#0a0a0{i}": f"var(--s{i})" for i in range(1, 5)} | {
    "#0b0b01": "var(--muted)",
    "#0b0b02": "var(--rule)",
}
_SERIES, (_MUTED, _RULE) = list(_STAND_INS)[:4], list(_STAND_INS)[4:]
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron_apt",
    "font.size": 8.5,
    "axes.linewidth": 0.7,
    "path.simplify_threshold": 0.3,
}
MAX_POINTS = 500
TAIL = 0.1
COLLAPSED, HEALTHY = 0.3, 0.5  # marks of a discriminator's loss; chance is 2 ln 2 = 1.39


@dataclass(frozen=True)
class Line:
    label: str
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Plot:
    """A title, up to 4 lines, and horizontal thresholds: value -> what it means."""

    title: str
    lines: tuple[Line, ...]
    thresholds: dict[float, str] = field(default_factory=dict)
    log: bool = False
    wide: bool = False


def line(rows: list[dict], key: str, label: str) -> Line | None:
    """The finite values of `key` over "iteration" in the rows of a log; None if there are none."""
    points = [(row.get("iteration", i), row[key]) for i, row in enumerate(rows) if _finite(row.get(key))]
    return Line(label, *np.array(points, dtype=float).T) if points else None


def tail(rows: list[dict], key: str) -> list[float]:
    """The finite values of `key` over the last tenth of a log."""
    values = [row[key] for row in rows if _finite(row.get(key))]
    return values[len(values) - math.ceil(TAIL * len(values)) :]


def tail_median(rows: list[dict], key: str) -> float:
    """Where a loss ended, without its noise: the median of its tail, NaN if that is empty.

    The median, because a collapsed discriminator's loss is near zero with single spikes
    that would rule a mean.
    """
    values = tail(rows, key)
    return float(np.median(values)) if values else math.nan


def stage_plots(rows: list[dict]) -> list[Plot]:
    """The plots that the keys of a training log allow: a loss, or the five curves that
    tell the health of an adversarial stage.
    """
    keys = sorted({key for row in rows for key in row if key == "loss" or key.startswith("loss/")})

    def series(*pairs):
        return tuple(found for key, label in pairs if (found := line(rows, key, label)))

    plots = [
        Plot("Loss", series(*[(key, key.removeprefix("loss/")) for key in keys])[:4]),
        Plot("Adversarial losses", series(("d/loss", "discriminator"), ("g/loss", "generator"))),
        Plot("Mean logits", series(("d/logit_real", "real"), ("d/logit_fake", "generated"))),
        Plot("Logit gap, real − generated", series(("d/logit_gap", "gap")), {0.0: ""}),
        Plot("aR1 penalty, before its weight", series(("d/ar1", "aR1")), log=True),
        Plot("Discriminator accuracy", series(("d/accuracy", "accuracy")), {0.5: "chance"}),
    ]
    return [plot for plot in plots if plot.lines]


def ablation_plot(with_ar1: list[dict], without_ar1: list[dict]) -> Plot | None:
    """Discriminator loss with and without aR1; None until there is a log without."""
    without = line(without_ar1, "d/loss", "without aR1")
    if without is None:
        return None
    regularised = line(with_ar1, "d/loss", "with aR1")
    thresholds = {HEALTHY: f"healthy above {HEALTHY}", COLLAPSED: f"collapsed below {COLLAPSED}"}
    return Plot(
        "Discriminator loss", tuple(found for found in (regularised, without) if found), thresholds, wide=True
    )


def svg(plot: Plot, name: str) -> str:
    """The drawing alone (title and legend belong to the page); `name` keeps its ids apart
    from those of the page's other drawings.
    """
    with matplotlib.rc_context(_STYLE):
        # Width in the proportion in which the page shows it: text then has the same size in all plots.
        figure = Figure((7.6, 2.7) if plot.wide else (3.6, 2.1), layout="constrained")
        axes = figure.add_subplot()
        for colour, data in zip(_SERIES, plot.lines, strict=False):
            _draw(axes, data, colour)
        _decorate(axes, plot)
        out = io.StringIO()
        figure.savefig(
            out,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _inline(out.getvalue(), name, plot.title)


def _draw(axes, data: Line, colour: str) -> None:
    """Every point faintly, and over it a curve that the eye can follow: a running median
    drops spikes, then a running mean evens out swings.
    """
    x, y = _thinned(data.x), _thinned(data.y)
    window = len(y) // 25
    if window < 2:
        axes.plot(x, y, color=colour, linewidth=1.4, marker="o" if len(y) < 3 else None, markersize=3)
        return
    axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.3)
    padded = np.pad(y, window, "edge")
    median = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * window + 1), axis=1)
    smooth = np.convolve(
        np.pad(median, window, "edge"), np.full(2 * window + 1, 1 / (2 * window + 1)), "valid"
    )
    axes.plot(x, smooth, color=colour, linewidth=1.5)


def _decorate(axes, plot: Plot) -> None:
    values = np.concatenate([data.y for data in plot.lines])
    if plot.log and values.min() > 0:
        axes.set_yscale("log")
    elif values.min() >= 0:
        # Single spikes run out of the picture rather than press the rest flat.
        axes.set_ylim(0, max(1.2 * np.percentile(values, 97), *plot.thresholds, 0.0) * 1.08 or 1.0)
    for number, (value, meaning) in enumerate(plot.thresholds.items()):
        axes.axhline(value, color=_MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            meaning,
            (1, value),
            (0, -10 if number else 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            color=_MUTED,
        )
    axes.set_xlabel("update", color=_MUTED)
    axes.margins(x=0.01)
    axes.grid(axis="y", color=_RULE, linewidth=0.6)
    axes.tick_params(length=0, labelcolor=_MUTED)
    axes.minorticks_off()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)


def _inline(text: str, name: str, title: str) -> str:
    """matplotlib's SVG file as an element of a page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    found = re.search(r'viewBox="[^"]*"', text)
    view_box = found[0] if found else ""
    text = re.sub(
        r"<svg[^>]*>", f'<svg {view_box} role="img" aria-label="{title}">', text, count=1, flags=re.DOTALL
    )
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text).replace("xlink:href", "href")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)
    for colour, variable in _STAND_INS.items():
        text = text.replace(colour, variable)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _thinned(values: np.ndarray) -> np.ndarray:
    """At most MAX_POINTS values, each the mean of its stretch: more would not be seen, only downloaded."""
    if len(values) <= MAX_POINTS:
        return values
    return np.array([part.mean() for part in np.array_split(values, MAX_POINTS)])


def _finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
