"""The report's sentences are chosen by the figures: each outcome has its own."""

import math

import pytest

from megatron_apt.demo.content import APT, CONSISTENCY, DIFFUSION, DIFFUSION_1, FLOOR, WITHOUT_AR1, Row
from megatron_apt.demo.findings import Compared, compare, of_ablation, of_samples


def table(accuracy: float = 0.98, diversity: float = 0.6, **distances: float) -> dict[str, Row]:
    """Rows by name. Their diversity is that of one diffusion step; real data's is 0.76."""
    names = {"many": DIFFUSION, "one": DIFFUSION_1, "consistency": CONSISTENCY, "apt": APT}
    names["without"] = WITHOUT_AR1
    rows = {FLOOR: Row(FLOOR, 0.29, 0.97, 0.76, math.nan, math.nan)}
    for key, distance in distances.items():
        rows[names[key]] = Row(names[key], distance, accuracy, diversity, 1, 0.1)
    return rows


def log(*losses: float) -> list[dict]:
    return [{"iteration": i, "d/loss": loss} for i, loss in enumerate(losses)]


HEALTHY, COLLAPSED, BETWEEN = log(*[1.39] * 90, *[1.24] * 10), log(*[1.39] * 90, *[0.04] * 10), log(0.4)


def test_figures_that_differ_by_less_than_a_tenth_are_alike():
    assert compare(1.0, 1.09) is compare(1.09, 1.0) is compare(0.0, 0.0) is Compared.ALIKE
    assert compare(1.0, 1.2) is Compared.NEARER and compare(1.2, 1.0) is Compared.FARTHER


@pytest.mark.parametrize(
    ("apt", "said"),
    [
        (0.74, "nearer to the data than the consistency model it started from (0.74 from"),
        (1.70, "about where the consistency model was that it started from (1.70 from the data"),
        (2.50, "farther from the data than the consistency model it started from (2.50"),
    ],
)  # fmt: skip
def test_apt_is_said_to_be_better_only_where_it_is(apt, said):
    (sentence, _) = of_samples(table(apt=apt, consistency=1.73))
    assert said in sentence
    assert ("more like the real one" in sentence) == (apt < 1)


@pytest.mark.parametrize(
    ("apt", "said"),
    [
        (0.3, "even nearer than 25 steps"),
        (0.44, "about as near"),
        (0.74, "25 steps of diffusion stay nearer"),
    ],
)
def test_apt_beside_the_diffusion_model(apt, said):
    assert said in of_samples(table(apt=apt, many=0.44))[0]


def test_one_step_of_diffusion():
    far, same = of_samples(table(one=4.46, many=0.44)), of_samples(table(one=0.45, many=0.44))
    assert far == [
        "In one step the diffusion model is far off (4.46 from the data, 0.44 in 25 steps). Its samples "
        "differ less from each other than real ones do (0.60, real 0.76), as averages do: look "
        "for soft strokes."
    ]
    assert same == [
        "The diffusion model needs no more than one step here (0.45 from the data, 0.44 in 25 steps)."
    ]
    assert "soft" not in of_samples(table(one=4.46, many=0.44, diversity=0.75))[0]


def test_nothing_is_said_of_what_is_not_measured():
    assert of_samples(table()) == of_samples({}) == of_samples(table(many=0.44)) == []
    assert of_samples(table(apt=math.nan, consistency=1.7, accuracy=math.nan)) == []
    assert of_samples(table(apt=0.7)) == [
        "A classifier trained on real data sees what the prompt says in 98 % of APT’s one-step samples, of "
        "real ones 97 %."
    ]


@pytest.mark.parametrize(
    ("without", "said", "not_said"),
    [
        (COLLAPSED, "Without aR1 the discriminator has collapsed", "healthy"),
        (BETWEEN, "between 0.3 and 0.5: weak, but no collapse yet", "has collapsed"),
        (HEALTHY, "above 0.5: this run does not collapse without aR1", "has collapsed"),
    ],
)
def test_a_collapse_is_told_where_the_loss_shows_it(without, said, not_said):
    text = " ".join(of_ablation(HEALTHY, without, {}))
    assert said in text and not_said not in text and "1.240 with aR1" in text


def test_spikes_of_a_collapsed_loss_are_told():
    text = " ".join(of_ablation(HEALTHY, log(*[0.04] * 99, 1.62), {}))
    assert "almost without error, with single updates up to 1.6." in text
    assert "single updates" not in " ".join(of_ablation(HEALTHY, COLLAPSED, {}))


def test_a_penalty_that_did_not_help_is_told():
    assert "With aR1, too, it ends below 0.5" in " ".join(of_ablation(COLLAPSED, COLLAPSED, {}))


@pytest.mark.parametrize(
    ("without", "apt", "said"),
    [
        (1.36, 0.74, "came nearer to the data, from 1.76 to 1.36, while the one with aR1 reached 0.74."),
        (2.49, 0.74, "went away from the data, from 1.76 to 2.49, while the one with aR1 reached 0.74."),
        (1.75, 0.74, "ended about where it started, at 1.75 from the data (start 1.76), while the one"),
        (0.75, 0.74, "from 1.76 to 0.75, and is about as near as the one with aR1 (0.74): in this run the "
        "distance shows no use of aR1."),
        (0.50, 0.74, "and is nearer than the one with aR1 (0.74): in this run the distance shows no use of"),
    ],
)  # fmt: skip
def test_what_the_generator_learned_without_ar1_is_what_the_distances_say(without, apt, said):
    text = " ".join(of_ablation(HEALTHY, COLLAPSED, table(consistency=1.76, apt=apt, without=without)))
    assert said in text and "learns nothing" not in text
