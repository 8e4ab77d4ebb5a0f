"""Runs Megatron-Core where there is no CUDA: the one place that adapts it.

Megatron-Core names the CUDA device in a few dozen literals
(`torch.cuda.current_device()`, `device='cuda'`, `.cuda()`). An import hook rewrites
exactly those literals in its source as the modules are loaded. Nothing global is patched,
installed files are untouched and line numbers stay the same, so tracebacks remain true.
On a machine with CUDA the hook steps aside.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import logging
import sys
import warnings

TESTED_VERSIONS = ("0.16.1",)

_RULES = (
    ("torch.cuda.current_device()", "torch.cpu.current_device()"),
    ("torch.cuda.synchronize()", "torch.cpu.synchronize()"),
    ("device='cuda'", "device='cpu'"),
    ('device="cuda"', 'device="cpu"'),
    ('init_data("cuda")', 'init_data("cpu")'),
    ("'torch.cuda.", "'torch."),
    (".cuda()", ".cpu()"),
    ('torch.autocast("cuda"', 'torch.autocast("cpu"'),
    ('device_type="cuda"', 'device_type="cpu"'),
    ("torch.cuda.manual_seed(", "torch.manual_seed("),
    ("torch.cuda.get_rng_state()", "torch.get_rng_state()"),
    ("torch.cuda.empty_cache()", "None"),
    ("pin_memory=True", "pin_memory=False"),
)

# Appended, so that no line number changes.
_APPENDED = {
    # Its fuser is torch.compile, which would start a C++ compiler for every fused
    # function, and takes two seconds to import.
    "megatron.core.jit": "\ndisable_jit_fuser()\n",
    # The two helpers read CUDA generators directly.
    "megatron.core.tensor_parallel.random": """
def _get_cuda_rng_state(device="cpu", clone=False, graph_safe=False):
    return torch.get_rng_state()
def _set_cuda_rng_state(new_state, device=-1, graph_safe=False):
    torch.set_rng_state(new_state)
""",
}


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        original = source = self.get_source(fullname) or ""
        for old, new in _RULES:
            source = source.replace(old, new)
        source += _APPENDED.get(fullname, "")
        if source == original:
            return super().get_code(fullname)
        # Bypasses the .pyc cache, which holds the unadapted code
        return compile(source, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds megatron.core modules; decides once, at the first of them, whether this process has CUDA."""

    active = None

    def find_spec(self, name, path, target=None):
        if name != "megatron.core" and not name.startswith("megatron.core."):
            return None
        if self.active is None:
            self.active = self._decide()
        if not self.active:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec

    @staticmethod
    def _decide():
        import torch

        if torch.cuda.is_available():
            return False
        version = importlib.metadata.version("megatron-core")
        if version not in TESTED_VERSIONS:
            warnings.warn(
                f"megatron-core {version} has not been tested without CUDA (tested: "
                f"{', '.join(TESTED_VERSIONS)}); if an import or a device error follows, install a tested "
                "version",
                stacklevel=2,
            )
        # It warns at every recomputation that the CPU generator moved, which here is the generator in use.
        logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
            lambda r: "CPU RNG state changed" not in r.getMessage()
        )
        return True


def install() -> None:
    """Puts the hook in front of the import system.

    Raises:
        ImportError: megatron.core is already loaded, so its CUDA literals can no longer
            be changed.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if "megatron.core" in sys.modules:
        import torch

        if not torch.cuda.is_available():
            raise ImportError(
                "megatron.core was imported before megatron_apt; on a machine without CUDA import "
                "megatron_apt first"
            )
        return
    sys.meta_path.insert(0, _Finder())
