"""Methods own what is theirs: no other module of the package names one."""

import ast
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import megatron_apt
from megatron_apt.config import InitConfig, RunConfig
from megatron_apt.methods.build import build_method
from megatron_apt.methods.registry import DEFAULT, METHODS, PRETRAINING, MethodConfigs

PACKAGE = Path(megatron_apt.__file__).parent
# Recipes choose methods, methods know themselves, and old names are old names
OWN = ("methods", "demo", "examples", "moved.py")
NAMES = tuple(METHODS)
CLASSES = {kind.__name__ for kind in METHODS.values()}
# A name, a field of its settings ("apt.ar1_lambda ..."), or a choice of it ("... method='apt'").
# Words that only look like one stay: flow-matching, the consistency function of a docstring.
SAYS = re.compile(rf"^({'|'.join(NAMES)})$|(?<![\w-])({'|'.join(NAMES)})\.[a-z]|method='?({'|'.join(NAMES)})")


def named(tree: ast.AST) -> list[str]:
    """What in a module names a method, with its line; docstrings and comments may."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in prose and SAYS.search(text):
                found.append((node.lineno, repr(text)))
            case ast.Attribute(attr=name) if name in NAMES:
                found.append((node.lineno, f".{name}"))
            case ast.keyword(arg=name) if name in NAMES:
                found.append((node.value.lineno, f"{name}="))
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name) if name in CLASSES:
                found.append((node.lineno, name))
            case ast.ImportFrom(module=str(module)) if re.search(rf"methods\.({'|'.join(NAMES)})\b", module):
                found.append((node.lineno, module))
    return [f"{line}: {what}" for line, what in found]


def test_no_module_names_a_method():
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        inside = file.relative_to(PACKAGE)
        if inside.parts[0] not in OWN and (names := named(ast.parse(file.read_text(encoding="utf-8")))):
            found[str(inside)] = names
    assert found == {}


@pytest.mark.parametrize(
    "code",
    [
        "x = config.apt.loss",
        "if method == 'flow': pass",
        "replace(config, consistency=1)",
        "AptConfig()",
        "from megatron_apt.methods.apt.config import AptConfig",
        "from megatron_apt.methods.flow import method",
        "x = config['apt']",
        "raise ValueError(f'apt.loss={loss}: no')",
        "x = f\"use method='apt'\"",
    ],
)
def test_a_name_is_found(code):
    assert named(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        '"""flow"""',
        "x = 'megatron-apt train'",
        "x = 'flow-matching'",
        "x = 'megatron_apt.cli'",
        "flow = 1",
        "def f():\n    'The consistency function.'",
    ],
)
def test_other_words_are_not(code):
    assert not named(ast.parse(code))


def test_every_field_of_a_method_is_a_choice_and_has_its_folder():
    assert [field.name for field in fields(MethodConfigs)] == ["method", *METHODS]
    assert {DEFAULT, PRETRAINING} <= set(METHODS)
    for name, kind in METHODS.items():
        assert is_dataclass(kind) and kind.__module__ == f"megatron_apt.methods.{name}.config"
        assert isinstance(getattr(RunConfig(), name), kind)
        assert type(RunConfig(method=name).of_method) is kind


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_declares_is_there(name):
    run = RunConfig(method=name)
    method = build_method(run, None)
    kind = METHODS[name]
    assert kind.sampled in method.roles and method.roles[kind.sampled].optimizer is not None
    assert kind.critic in ("", *method.roles)
    assert set(kind.needs) <= {field.name for field in fields(InitConfig)}
    assert kind.shown and kind.tags
    depths = run.of_method.depths(run.model.depth)
    assert sorted(set(depths)) == sorted({role.depth for role in method.roles.values()})


def test_a_method_is_imported_when_it_is_built():
    code = """
import sys
import megatron_apt.config
assert "torch" not in sys.modules
from megatron_apt.methods.build import build_method
build_method(megatron_apt.config.RunConfig(method="flow"), None)
print(*(name for name in sys.modules if name.startswith("megatron_apt.methods") and name.endswith(".method")))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["megatron_apt.methods.flow.method"], done.stderr
