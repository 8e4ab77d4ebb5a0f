"""Damaged and hostile inputs at every boundary, as tools/fuzz.py makes them: each works,
is refused by name, or is skipped and listed.
"""

import pytest
from fuzzing import BOUNDARIES

SHORT = {
    "pictures": 12,
    "videos": 12,
    "folders": 12,
    "datasets": 10,
    "encodings": 5,
    "checkpoints": 12,
    "configs": 8,
    "weights": 6,
    "tokenizers": 4,
}
SHORT |= {"bases": 5, "commands": 10, "records": 6}
LONG = 60


def campaign(worker, name: str, numbers: range) -> None:
    faults = [one for one in (worker.run(name, number) for number in numbers) if not one.good]
    if faults:
        pytest.fail(
            "\n".join(
                f"{one.boundary}:{one.number} {one.kind}: {one.what}\n  {one.message}" for one in faults
            ),
            pytrace=False,
        )


@pytest.mark.parametrize("name", BOUNDARIES)
def test_a_short_campaign(worker, name):
    campaign(worker, name, range(SHORT[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", BOUNDARIES)
def test_a_long_campaign(worker, name):
    campaign(worker, name, range(SHORT[name], SHORT[name] + LONG))
