"""Old names of modules: recipes and scripts written before a move keep importing them.

An old module stands for those that its names moved to, and says so in a FutureWarning. Nothing
inside the package uses an old name.
"""

import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_HERE = __package__
_FAMILIES = ("mmdit", "wan", "sd3", "flux", "hunyuan")


def _each(old: str, new: str, names: str) -> dict[str, tuple[str, ...]]:
    return {f"{old}.{name}".lstrip("."): (f"{new}.{name}",) for name in names.split()}


MODULES: dict[str, tuple[str, ...]] = {
    **_each("", "training", "guards log networks progress signals train"),
    **_each("optim", "training", "optimizers sharded"),
    **_each(
        "pipeline",
        "schedule",
        "actions build calibration check draw execute graph mail policies prepare program simulate",
    ),
    **_each(
        "data",
        "encode",
        "captions coded_size colour container decode each folder frames geometry hdr kinds lines "
        "manifest notes pictures policy rejected shard_writer table video written",
    ),
    **_each("evaluate", "demo", "plots suite"),
    **_each("models", "encoders", "foreign_folder weight_files"),
    "checkpoint.commands": ("checkpoint.command",),
    "convert.families": ("convert.counterparts", "families.registry"),
    "convert.family": ("convert.counterpart",),
    "data.digits": ("demo.digits",),
    "data.encode": ("encode.config", "encode.command"),
    "demo_files": ("demo.files",),
    "evaluate.report": ("demo.report", "demo.content"),
    "interrupts": ("demo.interrupts",),
    "launch": ("demo.processes",),
    "media": ("sample.media",),
    "models.codec": ("encoders.codec", "encoders.load", "families.wan.codec", "families.hunyuan.codec"),
    "models.families": ("families.registry",),
    "models.mmdit": ("families.mmdit.model", "models.joint"),
    "models.pipeline_image": ("encoders.image",),
    "models.pipeline_text": (
        "encoders.pipelines",
        *(f"families.{name}.text" for name in ("wan", "sd3", "flux", "hunyuan")),
    ),
    "models.single_stream": ("families.single_stream.model",),
    "models.text": ("encoders.text", "encoders.load"),
    **{f"models.{name}": (f"families.{name}.model",) for name in ("wan", "sd3", "hunyuan")},
    "pipeline.command": ("plan.schedule",),
    "recipes": ("demo.recipes",),
    "sample_config": ("sample.config",),
    "sampling": ("sample.sampler",),
}
"""Modules that are gone, and where their names are now."""

NAMES: dict[str, tuple[str, ...]] = {
    "config": tuple(f"methods.{name}.config" for name in ("apt", "consistency", "flow")),
    "models.config": (
        *(f"families.{name}.config" for name in _FAMILIES),
        "families.single_stream.config",
    ),
    "demo": ("demo.command",),
    "plan": ("plan.memory",),
    "sample": ("sample.command",),
}
"""Modules that are still there, and where names are that they had."""

_RENAMED: dict[tuple[str, str], tuple[str, Callable[[Any], Any]]] = {
    ("models.codec", "VAE_CODECS"): ("encoders.load", lambda module: module.vae_codecs()),
}


def names_of(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that lost names, by its full name.

    Raises:
        AttributeError: from it, for a name that the module never had.
    """
    old = module.removeprefix(f"{_HERE}.")
    places = MODULES.get(old) or NAMES[old]

    def get(name: str) -> Any:
        if (old, name) in _RENAMED:
            place, read = _RENAMED[old, name]
            _warn(old, name, place)
            return read(importlib.import_module(f"{_HERE}.{place}"))
        if not (name.startswith("_") or _is_submodule(module, name)):
            for place in places:
                found = importlib.import_module(f"{_HERE}.{place}")
                if hasattr(found, name):
                    _warn(old, name, place)
                    return getattr(found, name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return get


def _is_submodule(module: str, name: str) -> bool:
    """Which `from package import name` asks the package for first."""
    return hasattr(sys.modules[module], "__path__") and find_spec(f"{module}.{name}") is not None


def _warn(old: str, name: str, place: str) -> None:
    warnings.warn(
        f"{_HERE}.{old}.{name} is {_HERE}.{place}.{name} now; change the import",
        FutureWarning,
        stacklevel=3,
    )


class _Finder:
    """Finds modules that are gone. It is asked last, so others cost nothing."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        old = name.removeprefix(f"{_HERE}.")
        package = any(module.startswith(f"{old}.") for module in MODULES)
        if name == old or not (package or old in MODULES):
            return None
        return ModuleSpec(name, _Loader(), origin="moved", is_package=package)


class _Loader(Loader):
    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType | None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        if module.__name__.removeprefix(f"{_HERE}.") in MODULES:
            vars(module)["__getattr__"] = names_of(module.__name__)


def install() -> None:
    """Lets old modules be imported. Again is no harm."""
    if _Finder not in sys.meta_path:
        sys.meta_path.append(_Finder)
