"""What a user gets: the wheel's contents, the command that copies the examples, and versions that fit."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_apt.cli import main

ROOT = Path(__file__).parents[2]
BESIDE = ("examples", "tools", "kernels")


def shipped() -> dict[str, bytes]:
    """Files of the folders beside the package, by name."""
    files = (file for folder in BESIDE for file in (ROOT / folder).rglob("*") if file.is_file())
    return {
        str(file.relative_to(ROOT)): file.read_bytes() for file in files if file.parent.name != "__pycache__"
    }


def built(root: Path, *command: str) -> None:
    done = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def source_archive(tmp_path_factory) -> Path:
    """Built from a copy, because a build leaves folders in its source."""
    root = tmp_path_factory.mktemp("source") / "tree"
    made = shutil.ignore_patterns(".*", "__pycache__", "runs", "site", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, root, ignore=made)
    built(root, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')")
    (file,) = (root / "dist").glob("*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(source_archive) -> zipfile.ZipFile:
    """Built from the source archive."""
    folder = source_archive.parent
    built(folder, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", source_archive.name)
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.fixture(scope="module")
def requirements(wheel) -> list[Requirement]:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    return [Requirement(text) for text in metadata.get_all("Requires-Dist")]


def test_the_source_archive_holds_what_builds_and_tests_it(source_archive):
    with tarfile.open(source_archive) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = ("Makefile", "constraints.txt", "CHANGELOG.md", "CITATION.cff", "mkdocs.yml", "docs/data.md")
    assert names.issuperset([*shipped(), *files, f"tests/{Path(__file__).relative_to(ROOT / 'tests')}"])


def test_the_wheel_holds_the_package_with_examples_tools_and_kernels(wheel):
    for name, content in shipped().items():
        assert wheel.read(f"megatron_apt/{name}") == content
    modules = [file for file in (ROOT / "megatron_apt").rglob("*") if file.suffix in (".py", ".template")]
    assert {str(file.relative_to(ROOT)) for file in modules} <= {*wheel.namelist()}
    assert not [name for name in wheel.namelist() if not name.startswith("megatron_apt")]


def test_an_installed_package_copies_its_examples(wheel, tmp_path):
    wheel.extractall(tmp_path / "installed")
    command = [sys.executable, "-m", "megatron_apt", "examples", "mine"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": "installed"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine/examples/slurm/train.sbatch").is_file()


def test_examples_are_copied_whole_and_nothing_is_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["examples", "mine"])
    copied = {
        str(file.relative_to("mine")): file.read_bytes() for file in Path("mine").rglob("*") if file.is_file()
    }
    assert copied == {name: content for name, content in shipped().items() if not name.startswith("kernels")}
    assert "megatron-apt train mine/examples/tiny.py:image_flow" in capsys.readouterr().out

    shutil.rmtree("mine/examples")
    Path("mine/tools/fuzz.py").write_text("of the user")
    with pytest.raises(SystemExit, match=r"mine/tools/\S+ is there already .*megatron-apt examples FOLDER"):
        main(["examples", "mine"])
    assert Path("mine/tools/fuzz.py").read_text() == "of the user" and not Path("mine/examples").exists()


def test_examples_go_to_the_current_folder_and_never_through_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="megatron-apt examples"):
        main(["train", "examples/wan.py:consistency"])
    main(["examples"])
    assert Path("examples/wan.py").is_file()
    Path("file").touch()
    with pytest.raises(SystemExit, match="file"):
        main(["examples", "file"])


def test_versions_tested_together_are_versions_that_are_resolved(requirements):
    """What constraints.txt and the Makefile name, and what is installed here."""
    tested = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    makefile = (ROOT / "Makefile").read_text()
    for name in ("torch", "triton"):
        tested[name] = re.search(rf"^{name.upper()}_VERSION \?= (\S+)$", makefile, re.M)[1]
    wanted = {canonicalize_name(r.name): r for r in requirements}
    assert tested.keys() <= wanted.keys()
    for name, requirement in wanted.items():
        assert re.search(r"<\d|==", str(requirement.specifier)), f"{name} has no upper bound"
        if name in tested:
            assert requirement.specifier.contains(tested[name]), requirement
        try:
            assert requirement.specifier.contains(importlib.metadata.version(name)), requirement
        except importlib.metadata.PackageNotFoundError:
            assert requirement.marker, f"{name} is not installed"


def test_the_image_and_the_citation_are_of_these_versions():
    makefile, dockerfile = ((ROOT / name).read_text() for name in ("Makefile", "Dockerfile"))
    torch = r"^(?:ARG )?TORCH_VERSION ?\??= ?(\S+)$"
    assert re.findall(torch, makefile, re.M) == re.findall(torch, dockerfile, re.M) != []
    copied = re.findall(r"^COPY (.*) \S+$", dockerfile, re.M)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists()
        assert f"!{name}\n" in (ROOT / ".dockerignore").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = re.search(r'version="(\S+)"', (ROOT / "setup.py").read_text())[1]
    assert citation["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_issue_forms_have_fields_to_fill(name):
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert form["name"] and form["description"]
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in fields}) == len(fields) >= 3
    assert all(part["attributes"]["label"] for part in fields)
