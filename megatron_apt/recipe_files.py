"""Recipes: `FILE.py:FUNCTION`, a function of a Python file that returns a RunConfig."""

import ast
import difflib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from megatron_apt.config import RunConfig
from megatron_apt.errors import out_of_memory

_EXAMPLE = "for example examples/tiny.py:image"


class RecipeError(ValueError):
    """A recipe that cannot be found, read or called."""


def load_recipe(spec: str) -> RunConfig:
    """RunConfig of `FILE.py:FUNCTION`.

    Raises:
        RecipeError: no such file or function, one that fails (by file and line of the
            recipe), or returns something else.
    """
    file, name = find_recipe(spec)
    module = _run(spec, file, lambda: _module(file))
    recipe = getattr(module, name, None)
    if not callable(recipe):
        raise RecipeError(
            f"recipe {spec!r}: {file} has no function {name!r}; {_offered(name, _callables(module))}"
        )
    config = _run(spec, file, recipe)
    if not isinstance(config, RunConfig):
        raise RecipeError(
            f"recipe {spec!r}: {name} returned {type(config).__name__}, not a RunConfig; a recipe ends with "
            "return RunConfig(...)"
        )
    return config


def find_recipe(spec: str) -> tuple[Path, str]:
    """File and function of a recipe; the file is parsed, and nothing of it runs.

    Raises:
        RecipeError: it is not there, or the file is not Python.
    """
    text, _, name = spec.rpartition(":") if ":" in spec else (spec, "", "")
    file = _existing(spec, text)
    functions, exact = _functions(spec, file)
    if not name:
        raise RecipeError(
            f"recipe {spec!r}: names no function; give {file}:FUNCTION. {_offered('', functions)}"
        )
    if exact and name not in functions:
        raise RecipeError(f"recipe {spec!r}: {file} has no function {name!r}; {_offered(name, functions)}")
    return file, name


def _existing(spec: str, text: str) -> Path:
    file = Path(text)
    if not text or "\0" in text:
        raise RecipeError(f"recipe {spec!r}: give FILE.py:FUNCTION, {_EXAMPLE}")
    if file.is_dir():
        found = sorted(path.name for path in file.glob("*.py"))[:12]
        raise RecipeError(
            f"recipe {spec!r}: {file} is a folder; give FILE.py:FUNCTION of a file in it "
            f"({', '.join(found) or 'it has none'})"
        )
    if not file.exists():
        raise RecipeError(f"recipe {spec!r}: there is no file {file}{_neighbours(file)}")
    if file.suffix != ".py":
        raise RecipeError(f"recipe {spec!r}: {file} is not a .py file; give FILE.py:FUNCTION, {_EXAMPLE}")
    return file


def _neighbours(file: Path) -> str:
    """What may have been meant by a file that is not there."""
    if file.with_name(file.name + ".py").is_file():
        return f"; there is {file}.py"
    if not file.parent.is_dir():
        hint = (
            "; `megatron-apt examples` writes those of the package" if file.parent.name == "examples" else ""
        )
        return f", nor a folder {file.parent}{hint}"
    names = sorted(path.name for path in file.parent.glob("*.py"))
    close = difflib.get_close_matches(file.name, names, 3) or [
        name for name in names if name.lower() == file.name.lower()
    ]
    if close:
        return f"; there is {' and '.join(str(file.with_name(name)) for name in close)}"
    return (
        f"; {file.parent if str(file.parent) != '.' else 'this folder'} has "
        f"{', '.join(names[:12]) if names else 'no .py file'}"
    )


def _functions(spec: str, file: Path) -> tuple[list[str], bool]:
    """Names of functions that need no argument, and whether there can be no others.

    Others may come by imports and assignments.
    """
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except SyntaxError as error:
        if error.lineno is None:  # null bytes
            raise RecipeError(f"recipe {spec!r}: {file} is not Python ({error.msg})") from None
        raise RecipeError(f"recipe {spec!r}: {_syntax(file, error)}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # bytes of no encoding, nested too deeply
        raise RecipeError(f"recipe {spec!r}: {file} is not Python ({error})") from None
    except OSError as error:
        raise RecipeError(f"recipe {spec!r}: {file} cannot be read ({error.strerror})") from None
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and _needs_nothing(node)]
    plain = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Expr)
    others = [
        alias
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == "*" or node.module is None
    ]
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    exact = not others and not imported and all(isinstance(node, plain) for node in tree.body)
    return names, exact


def _needs_nothing(node: ast.FunctionDef) -> bool:
    arguments = node.args
    positional = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
    return (
        not node.name.startswith("_")
        and positional == 0
        and all(default is not None for default in arguments.kw_defaults)
    )


def _syntax(file: Path, error: SyntaxError) -> str:
    line = f": {error.text.strip()}" if error.text else ""
    return f"{error.filename or file}:{error.lineno or 0}: {error.msg}{line}; correct the line"


def _offered(name: str, known: list[str]) -> str:
    if not known:
        return "it has none"
    close = difflib.get_close_matches(name, known, 1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{meant}It has {', '.join(known)}"


def _callables(module: ModuleType) -> list[str]:
    return [
        key
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__ and key[0] != "_"
    ]


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader  # of a file that is there
    module = importlib.util.module_from_spec(spec)
    # Recipes may build on their neighbours, as with plain python
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def _run(spec: str, file: Path, action):
    """The recipe's own code, whose failures are its author's: named by the line of theirs
    in which they arose.
    """
    try:
        return action()
    except SyntaxError as error:  # of a neighbour
        raise RecipeError(f"recipe {spec!r}: {_syntax(file, error)}") from None
    except SystemExit as error:
        raise RecipeError(
            f"recipe {spec!r}: {_place(file, error)}: the recipe ended the program (exit {error.code})"
        ) from None
    except Exception as error:
        if out_of_memory(error):
            raise
        raise RecipeError(
            f"recipe {spec!r}: {_place(file, error)}: {type(error).__name__}: {error}; correct the recipe"
        ) from error


def _place(file: Path, error: BaseException) -> str:
    """The innermost line of the recipe, or of a file beside it."""
    folder = file.resolve().parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _beside(frame.filename, folder)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else str(file)


def _beside(name: str, folder: Path) -> bool:
    return not name.startswith("<") and Path(name).resolve().parent == folder
