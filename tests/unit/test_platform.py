"""The adaptation that lets Megatron-Core run without CUDA."""

import importlib
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_apt.config import DataConfig, ParallelConfig, RunConfig, check_fits
from megatron_apt.models.spec import LocalBackend, TransformerEngineBackend, choose_backend
from megatron_apt.parallel import megatron_cpu
from megatron_apt.parallel.startup import start

cpu_only = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the adaptation steps aside where there is CUDA"
)
USED = (
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.tensor_parallel.random",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
)


@cpu_only
@pytest.mark.parametrize("name", USED)
def test_line_numbers_stay_those_of_the_installed_file(name):
    module = importlib.import_module(name)
    installed = Path(module.__file__).read_text()
    adapted = installed
    for old, new in megatron_cpu._RULES:
        assert old.count("\n") == new.count("\n") == 0
        adapted = adapted.replace(old, new)
    assert len(adapted.splitlines()) == len(installed.splitlines())
    for function in (
        f for f in vars(module).values() if getattr(f, "__module__", "") == name and hasattr(f, "__code__")
    ):
        if name not in megatron_cpu._APPENDED:
            assert f"def {function.__name__}" in "\n".join(
                installed.splitlines()[function.__code__.co_firstlineno - 1 :][:6]
            )


@cpu_only
def test_the_installed_version_is_one_that_was_tested():
    assert importlib.metadata.version("megatron-core") in megatron_cpu.TESTED_VERSIONS


@cpu_only
def test_importing_megatron_core_first_is_refused():
    code = "import megatron.core, megatron_apt"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode != 0
    assert "import megatron_apt first" in result.stderr


@cpu_only
def test_recomputation_keeps_the_random_state():
    from megatron.core.tensor_parallel.random import _get_cuda_rng_state, _set_cuda_rng_state

    torch.manual_seed(3)
    before = _get_cuda_rng_state()
    first = torch.rand(3)
    _set_cuda_rng_state(before)
    assert torch.equal(torch.rand(3), first)


def test_backends_are_chosen_by_machine(monkeypatch):
    from megatron_apt.models import spec

    def chosen(installed, recent, dtype="bfloat16"):
        choose_backend.cache_clear()
        monkeypatch.setattr(spec.te, "HAVE_TE", installed)
        monkeypatch.setattr(spec, "is_te_min_version", lambda version: recent)
        return choose_backend("cuda", dtype)

    try:
        assert isinstance(choose_backend("cpu", "bfloat16"), LocalBackend)
        with pytest.warns(UserWarning, match="Transformer Engine is not installed"):
            assert isinstance(chosen(installed=False, recent=False), LocalBackend)
        with pytest.warns(UserWarning, match=r"is too old \(2\.8\.0 is needed\)"):
            assert isinstance(chosen(installed=True, recent=False), LocalBackend)
        assert isinstance(chosen(installed=True, recent=True), TransformerEngineBackend)
        assert isinstance(chosen(installed=True, recent=True, dtype="float32"), LocalBackend)
    finally:
        choose_backend.cache_clear()


@cpu_only
def test_the_rings_of_transformer_engine_are_refused_without_it(mesh):
    with pytest.raises(
        ValueError,
        match=r"context_parallel='p2p' is Transformer Engine's, on CUDA; "
        "there is none: use ulysses or all_gather",
    ):
        start(ParallelConfig(context_parallel="p2p"))
    with pytest.raises(
        ValueError, match=r"parallel\.context_parallel_inner=3: with a2a\+p2p give a divisor of cp=4"
    ):
        ParallelConfig(cp=4, context_parallel="a2a+p2p", context_parallel_inner=3)
    with pytest.raises(ValueError, match=r"parallel\.context_parallel_inner=2"):
        ParallelConfig(cp=4, context_parallel_inner=2)
    with pytest.raises(
        ValueError,
        match=r"leaves 4 heads, which do not split over the 3 ranks that trade them "
        r"\(parallel\.context_parallel=ulysses\)",
    ):
        check_fits(RunConfig(parallel=ParallelConfig(cp=3)))
    ring = RunConfig(
        parallel=ParallelConfig(tp=2, cp=4, context_parallel="a2a+p2p", context_parallel_inner=2),
        data=DataConfig(text_length=8),
    )
    check_fits(ring)
    with pytest.raises(
        ValueError, match=r"needs captions of one length: set data\.text_length=6 to a multiple of cp=4"
    ):
        check_fits(replace(ring, data=DataConfig(text_length=6)))
    with pytest.raises(ValueError, match=r"micro_batch=3 must be a multiple"):
        check_fits(replace(ring, micro_batch=3))
