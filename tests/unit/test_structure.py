"""What may import what: no circles, at the top of a module or later, and rooms in order."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_apt
from megatron_apt.families.registry import FAMILIES

ROOT = Path(megatron_apt.__file__).parent
KERNELS = ROOT.parent / "kernels"  # installed as megatron_apt.kernels

# What no module of a room imports, anywhere in it
NEVER = {
    "parallel": "training methods schedule data checkpoint encode encoders convert sample plan demo",
    "models": "training methods schedule data checkpoint encode encoders convert sample plan demo",
    "data": "training methods schedule checkpoint encode convert sample plan demo",
    "encode": "training methods schedule checkpoint models sample plan demo",
    "encoders": "training methods schedule checkpoint encode sample plan demo",
    "methods": "training schedule checkpoint encode encoders convert sample plan demo",
    "schedule": "training checkpoint encode encoders convert sample plan demo",
    "training": "encode encoders convert sample plan demo",
    "convert": "methods schedule encode sample plan demo",
    "evaluate": "training methods schedule checkpoint encode sample plan demo",
    "sample": "schedule convert plan demo",
    "plan": "encode encoders convert sample demo",
}
# Settings, and what a method declares of itself: they take no torch and may be read anywhere
DECLARED = {"megatron_apt.methods.config", "megatron_apt.methods.registry"}


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for prefix, folder in (("megatron_apt", ROOT), ("megatron_apt.kernels", KERNELS)):
        for file in folder.rglob("*.py"):
            name = ".".join((prefix, *file.relative_to(folder).with_suffix("").parts))
            found[name.removesuffix(".__init__")] = file
    return found


def targets(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Names that an import may stand for: `from a import b` is a, and a.b if that is a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]


def imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports that ever run, those in functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        yield from imports(child)


def graph(files: dict[str, Path]) -> dict[str, set[str]]:
    """Modules that each module imports."""
    return {
        name: {
            target
            for node in imports(ast.parse(file.read_text(encoding="utf-8")))
            for target in targets(node)
            if target in files and target != name
        }
        for name, file in files.items()
    }


def reached(edges: dict[str, set[str]], start: str) -> set[str]:
    found, waiting = set(), [start]
    while waiting:
        for target in edges[waiting.pop()] - found:
            found.add(target)
            waiting.append(target)
    return found


def circles(edges: dict[str, set[str]]) -> set[frozenset[str]]:
    """Groups of modules that import each other, by whatever way."""
    reach = {name: reached(edges, name) for name in edges}
    return {
        frozenset({name} | {other for other in reach[name] if name in reach[other]})
        for name in edges
        if name in reach[name]
    }


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    """Of the package."""
    return graph(modules())


def test_circles_are_found():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set()}
    assert circles(edges) == {frozenset("abc")}
    assert circles(edges | {"c": {"d"}}) == set()


def test_there_is_no_import_circle(edges):
    found = circles(edges)
    assert not found, [sorted(circle) for circle in found]


def test_imports_are_absolute():
    for name, file in modules().items():
        relative = [node for node in imports(ast.parse(file.read_text())) if getattr(node, "level", 0)]
        assert not relative, name


def test_kernels_import_kernels_alone(edges):
    for name in edges:
        if name.startswith("megatron_apt.kernels"):
            others = {target for target in edges[name] if not target.startswith("megatron_apt.kernels")}
            assert others <= {"megatron_apt"}, name


@pytest.mark.parametrize("room", NEVER)
def test_a_room_imports_none_that_stands_above_it(edges, room):
    wrong = {
        f"{name} imports {target}"
        for name, found in edges.items()
        if name.split(".")[1:2] == [room] and not name.endswith(".command")
        for target in found - DECLARED
        if target.split(".")[1:2] and target.split(".")[1] in NEVER[room].split()
    }
    assert not wrong


@pytest.mark.parametrize("module", ["cli", "config", "demo.recipes", "files", "lock", "schema"])
def test_what_help_needs_does_not_import_torch(module):
    code = f"import sys, megatron_apt.{module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"megatron_apt.{module} imports torch"


# --- families

FAMILY = re.compile(r"(?i)(?<![a-z])(" + "|".join(FAMILIES) + r"|stable.?diffusion.?3)(?![a-z])")
# Models of other kinds, in messages that tell what a foreign file is; Flux, which starts jobs
OTHERS = {
    "a Wan VACE (a transformer with controls beside the video)",
    "Wan Animate",
    "a transformer of FLUX.2",
    *("FLUX_JOB_SIZE", "FLUX_TASK_RANK", "FLUX_TASK_LOCAL_ID"),
}


def code_words(tree: ast.AST) -> Iterator[str]:
    """Identifiers and texts of a module, without its docstrings."""
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word):
                yield word
            case ast.ClassDef(name=word) | ast.FunctionDef(name=word):
                yield word
            case ast.ImportFrom(module=str(word)):
                yield word
            case ast.Constant(value=str(word)) if id(node) not in documentation:
                yield word


def names_a_family(word: str) -> bool:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", word).replace("_", " ")
    return word not in OTHERS and FAMILY.search(spaced) is not None


def test_families_are_named_in_their_folders_alone():
    """But for demo/recipes.py, which is a recipe, and so chooses one, and the table of old names."""
    others = {"megatron_apt.demo.recipes", "megatron_apt.moved"}
    naming = {
        name: sorted(found)
        for name, file in modules().items()
        if not name.startswith("megatron_apt.families.") and name not in others
        if (found := set(filter(names_a_family, code_words(ast.parse(file.read_text())))))
    }
    assert not naming


def test_what_names_a_family_is_found():
    words = code_words(
        ast.parse('"""wan"""\nclass WanBlock:\n    kind = "sd3"\nmodel.flux_dev(wanted, influx)')
    )
    assert set(filter(names_a_family, words)) == {"WanBlock", "sd3", "flux_dev"}
