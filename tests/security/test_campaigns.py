"""Damaged and hostile inputs at every boundary, as tools/fuzz.py makes them: each works,
is refused by name, or is skipped and listed.
"""

import pytest
from fuzzing import BOUNDARIES

# Inputs of `make test`; `make test-all` goes on to END.
SHORT = {
    "pictures": 5,
    "videos": 8,
    "folders": 8,
    "datasets": 3,
    "encodings": 3,
    "checkpoints": 8,
    "configs": 2,
    "weights": 4,
    "tokenizers": 3,
}
SHORT |= {"bases": 3, "commands": 5, "records": 4}
END = 72


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
    campaign(worker, name, range(SHORT[name], END))
