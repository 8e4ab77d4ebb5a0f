"""How the tests lie: a folder for each part of the program, what several share in support/."""

import re
from pathlib import Path

import pytest

from support.tiers import LATER

TESTS = Path(__file__).parents[1]
FOLDERS = ("cli", "convert", "data", "kernels", "parity", "security", "training", "unit")
# Also inside of scripts that a test writes for another process.
IMPORTS = re.compile(r"^[ \t]*(?:from|import) +((?:[a-z]+\.)*test_\w+)|import +(test_\w+)", re.MULTILINE)


def imported_tests(text: str) -> list[str]:
    """Test modules that a module imports."""
    return [name or other for name, other in IMPORTS.findall(text)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("from test_train import config\n", ["test_train"]),
        ("    import tests.unit.test_models as models\n", ["tests.unit.test_models"]),
        ("from unit import test_models\n", ["test_models"]),
        ("from support.runs import config\n\n\ndef test_of_import():\n    ...\n", []),
    ],
)
def test_an_import_of_a_test_module_is_seen(text, names):
    assert imported_tests(text) == names


def test_no_test_module_imports_another():
    modules = [file for file in TESTS.rglob("*.py") if file.name != Path(__file__).name]
    assert len(modules) > 80
    found = {str(file.relative_to(TESTS)): imported_tests(file.read_text()) for file in modules}
    assert not {file: names for file, names in found.items() if names}


def test_every_test_module_lies_in_a_folder_of_its_part():
    assert {file.parent.name for file in TESTS.rglob("test_*.py")} == set(FOLDERS)
    assert not list((TESTS / "support").glob("test_*.py"))


def test_a_worker_knows_the_groups_of_tests(request):
    """Without them tests of several processes would run side by side."""
    if not hasattr(request.config, "workerinput"):
        pytest.skip("one process runs all tests")
    assert request.node.nodeid.endswith("@test_layout.py")


def test_what_is_left_to_test_all_is_there(request):
    """A name that nothing has any more would be a test that nobody leaves out."""
    files = {name.partition("::")[0] for name in LATER}
    assert files <= {file.name for file in TESTS.rglob("test_*.py")}
    names = {name.partition("::")[2].partition("[")[0] for name in LATER}
    source = "".join(file.read_text() for file in TESTS.rglob("test_*.py"))
    assert all(f"def {name}(" in source for name in names)
