import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))


@pytest.fixture(scope="session")
def worker(tmp_path_factory):
    """The process that takes hostile inputs, for all campaigns, with valid ones in a folder of its own."""
    from fuzzing.worker import Worker

    worker = Worker(tmp_path_factory.mktemp("fuzz"), seed=0, limit=30.0)
    yield worker
    worker.stop()
