"""What may be said of a demo's results. Every sentence is chosen by figures and quotes
them, so that none says more than was measured.
"""

import math
from enum import Enum

from megatron_apt.demo.content import APT, CONSISTENCY, DIFFUSION, DIFFUSION_1, FLOOR, WITHOUT_AR1, Row
from megatron_apt.demo.plots import COLLAPSED, HEALTHY, tail, tail_median

NOTICEABLE = 0.1  # two figures that differ by a smaller share are called alike


class Compared(Enum):
    """One distance to the data beside another."""

    NEARER = "nearer"
    ALIKE = "alike"
    FARTHER = "farther"


def compare(distance: float, other: float) -> Compared:
    if abs(distance - other) <= NOTICEABLE * max(abs(distance), abs(other)):
        return Compared.ALIKE
    return Compared.NEARER if distance < other else Compared.FARTHER


# --- what to look for in the pictures


def of_samples(rows: dict[str, Row]) -> list[str]:
    """What the figures let a reader expect of the pictures; one sentence or two for each comparison that
    has been measured.

    Args:
        rows: of a table, by name.
    """
    found = [_one_diffusion_step(rows), _apt_and_consistency(rows), _apt_and_diffusion(rows), _captions(rows)]
    return [sentence for sentence in found if sentence]


def _one_diffusion_step(rows: dict[str, Row]) -> str:
    if not _measured(rows, DIFFUSION, DIFFUSION_1):
        return ""
    many, one = rows[DIFFUSION], rows[DIFFUSION_1]
    figures = f"{one.frechet:.2f} from the data, {many.frechet:.2f} in 25 steps"
    if compare(one.frechet, many.frechet) is not Compared.FARTHER:
        return f"The diffusion model needs no more than one step here ({figures})."
    said = f"In one step the diffusion model is far off ({figures})."
    if FLOOR in rows and one.diversity < (1 - NOTICEABLE) * rows[FLOOR].diversity:
        said += (
            f" Its samples differ less from each other than real ones do ({one.diversity:.2f}, real "
            f"{rows[FLOOR].diversity:.2f}), as averages do: look for soft strokes."
        )
    return said


def _apt_and_consistency(rows: dict[str, Row]) -> str:
    if not _measured(rows, APT, CONSISTENCY):
        return ""
    apt, start = rows[APT].frechet, rows[CONSISTENCY].frechet
    figures = f"{apt:.2f} from the data, consistency {start:.2f}"
    return {
        Compared.NEARER: f"APT’s one step is nearer to the data than the consistency model it started from "
        f"({figures}): its column should look more like the real one.",
        Compared.ALIKE: f"APT’s one step is about where the consistency model was that it started from "
        f"({figures}): the two columns should look alike.",
        Compared.FARTHER: f"APT’s one step is farther from the data than the consistency model it started "
        f"from ({figures}): adversarial training made it worse here.",
    }[compare(apt, start)]


def _apt_and_diffusion(rows: dict[str, Row]) -> str:
    if not _measured(rows, APT, DIFFUSION):
        return ""
    apt, many = rows[APT].frechet, rows[DIFFUSION].frechet
    figures = f"{many:.2f} against {apt:.2f}"
    return {
        Compared.NEARER: f"It is even nearer than 25 steps of diffusion ({figures}).",
        Compared.ALIKE: f"It is about as near as 25 steps of diffusion ({figures}).",
        Compared.FARTHER: f"25 steps of diffusion stay nearer ({figures}), at 25 times the evaluations.",
    }[compare(apt, many)]


def _captions(rows: dict[str, Row]) -> str:
    if APT not in rows or not math.isfinite(rows[APT].accuracy):
        return ""
    real = f", of real ones {100 * rows[FLOOR].accuracy:.0f} %" if FLOOR in rows else ""
    return (
        f"A classifier trained on real data sees what the prompt says in {100 * rows[APT].accuracy:.0f} % of "
        f"APT’s one-step samples{real}."
    )


# --- what the ablation shows


def of_ablation(with_ar1: list[dict], without_ar1: list[dict], rows: dict[str, Row]) -> list[str]:
    """What leaving out aR1 has changed: where the discriminator's loss ended, and how far
    the two generators are from the data.

    Args:
        with_ar1, without_ar1: rows of the two training logs.
        rows: of the table, by name.
    """
    kept, left_out = tail_median(with_ar1, "d/loss"), tail_median(without_ar1, "d/loss")
    ends = [(kept, "with aR1"), (left_out, "without aR1")]
    ends = " and ".join(f"{value:.3f} {name}" for value, name in ends if math.isfinite(value))
    found = [f"The discriminator’s loss ends at {ends} (median of the last tenth of the updates)."]
    found += [_without(left_out, without_ar1), _with(kept), _distances(rows)]
    return [sentence for sentence in found if sentence]


def _without(end: float, rows: list[dict]) -> str:
    if not math.isfinite(end):
        return ""
    if end >= HEALTHY:
        return f"That is above {HEALTHY}: this run does not collapse without aR1."
    if end >= COLLAPSED:
        return f"Without aR1 that is between {COLLAPSED} and {HEALTHY}: weak, but no collapse yet."
    said = "Without aR1 the discriminator has collapsed: it tells generated from real almost without error"
    highest = max(tail(rows, "d/loss"))
    spikes = f", with single updates up to {highest:.1f}" if highest >= HEALTHY else ""
    return f"{said}{spikes}."


def _with(end: float) -> str:
    if not math.isfinite(end) or end >= HEALTHY:
        return ""
    return f"With aR1, too, it ends below {HEALTHY}: the penalty is too weak in this run."


def _distances(rows: dict[str, Row]) -> str:
    """How far the generator came without aR1, from where both started and beside where the other ended."""
    if not _measured(rows, APT, CONSISTENCY, WITHOUT_AR1):
        return ""
    start, kept, left_out = (rows[name].frechet for name in (CONSISTENCY, APT, WITHOUT_AR1))
    came = {
        Compared.NEARER: f"Its generator still came nearer to the data, from {start:.2f} to {left_out:.2f}",
        Compared.ALIKE: f"Its generator ended about where it started, at {left_out:.2f} from the data "
        f"(start {start:.2f})",
        Compared.FARTHER: f"Its generator went away from the data, from {start:.2f} to {left_out:.2f}",
    }[compare(left_out, start)]
    beside = {
        Compared.NEARER: f"and is nearer than the one with aR1 ({kept:.2f}): in this run the distance shows "
        "no use of aR1.",
        Compared.ALIKE: f"and is about as near as the one with aR1 ({kept:.2f}): in this run the distance "
        "shows no use of aR1.",
        Compared.FARTHER: f"while the one with aR1 reached {kept:.2f}.",
    }[compare(left_out, kept)]
    return f"{came}, {beside}"


def _measured(rows: dict[str, Row], *names: str) -> bool:
    return all(name in rows and math.isfinite(rows[name].frechet) for name in names)
