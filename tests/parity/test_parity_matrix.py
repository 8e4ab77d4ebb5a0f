"""Every mesh computes what one rank computes: three whole iterations of two networks,
with accumulation and a remainder.

In float64 everything is compared at 1e-9: losses, every gradient, updated weights of both
networks, the average. In fp32 and bf16 the gradients of the first iteration are compared.
`make test` runs every mesh of two ranks, one of each kind of four and one of eight; `make
test-all` runs the whole table.
"""

import contextlib
from dataclasses import replace

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_apt.config import ParallelConfig, PipelineConfig
from megatron_apt.data.microbatch import Microbatch
from megatron_apt.kernels.keyed_noise import derive_key
from megatron_apt.parallel import collectives, context
from megatron_apt.training.sharded import ShardedParameters
from support.parity import (
    DATA,
    ITERATIONS,
    SCHEDULES,
    TOLERANCE,
    compare_exactly,
    compare_rounded,
    deep,
    iterations,
    meshes,
    pipelines,
    problem,
)

pytestmark = pytest.mark.dist

MESHES = [(world, name, parallel) for world in (2, 4) for name, parallel in meshes(world).items()]
# Six samples do not go round eight data-parallel ranks, so that mesh is left out.
EIGHT = [(8, name, parallel) for name, parallel in meshes(8).items() if parallel.tp * parallel.cp > 1]
# Of `make test`: a group of four in each dimension; two dimensions; all three.
FAST_FOUR = ("tp4-sp-cp1-dp1", "tp1-cp4-all_gather-dp1", "tp1-cp1-dp4", "tp2-cp2-all_gather-dp1")
FAST_EIGHT = "tp2-sp-cp2-ulysses-dp2"

_references: dict = {}


def reference(mesh, config, data):
    key = (config, data)
    if key not in _references:
        _references[key] = iterations(mesh, config, data)
    return _references[key]


def check(ranks, mesh, world, parallel, config, data):
    want = reference(mesh, config, data)
    for got in ranks(world).run(iterations, parallel, config, data):
        if config.model.dtype == "float64":
            compare_exactly(got, want)
        else:
            compare_rounded(got, want, reference(mesh, problem(), data), **TOLERANCE[config.model.dtype])


def ids(case):
    return case[1]


def test_the_matrix_is_complete():
    """2 ranks: tp (2), cp (2), dp; 4 ranks: tp4 (2), cp4 (2), dp4, tp2 cp2 (4), tp2 dp2
    (2), cp2 dp2 (2); 8 ranks: all but dp8.
    """
    assert (len(meshes(2)), len(meshes(4)), len(meshes(8)), len(EIGHT)) == (5, 13, 13, 12)
    names = {name for _, name, _ in (*MESHES, *EIGHT)}
    assert names >= {*FAST_FOUR, FAST_EIGHT}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if case[0] == 4 and case[1] not in FAST_FOUR else ())
        for case in MESHES
    ],
    ids=ids,
)
def test_apt_on_mixed_data(ranks, mesh, case):
    world, _, parallel = case
    check(ranks, mesh, world, parallel, problem(), "mixed")


@pytest.mark.slow
@pytest.mark.parametrize("data", ["images", "videos"])
@pytest.mark.parametrize("case", MESHES, ids=ids)
def test_apt_on_images_and_videos(ranks, mesh, case, data):
    world, _, parallel = case
    check(ranks, mesh, world, parallel, problem(), data)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["flow", "consistency"])
@pytest.mark.parametrize("case", MESHES, ids=ids)
def test_the_other_methods(ranks, mesh, case, method):
    world, _, parallel = case
    check(ranks, mesh, world, parallel, problem(method, recompute="full"), "mixed")


@pytest.mark.slow
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", MESHES, ids=ids)
def test_low_precision(ranks, mesh, case, dtype, data):
    world, _, parallel = case
    check(ranks, mesh, world, parallel, problem(dtype=dtype), data)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c[1] == FAST_EIGHT else pytest.mark.slow, id=c[1]) for c in EIGHT]
)
def test_eight_ranks(ranks, mesh, case):
    world, _, parallel = case
    check(ranks, mesh, world, parallel, problem(), "mixed")


PADDED = {"tp2": ParallelConfig(tp=2, row_multiple=16), "cp2": ParallelConfig(cp=2, row_multiple=32)}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tp2", "images"),
        ("cp2", "mixed"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("tp2", "mixed"), ("cp2", "images"))),
    ],
)
def test_rows_padded_for_fp8_change_nothing(ranks, mesh, name, data):
    check(ranks, mesh, 2, PADDED[name], problem(), data)


# A part of the tables above, for `make test`.
TP, CP, GATHER, DP = "tp2-sp-cp1-dp1", "tp1-cp2-ulysses-dp1", "tp1-cp2-all_gather-dp1", "tp1-cp1-dp2"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(TP, "float32"), (CP, "float32"), (DP, "float32"), (TP, "bfloat16"), (GATHER, "bfloat16")],
)
def test_low_precision_on_two_ranks(ranks, mesh, name, dtype):
    check(ranks, mesh, 2, meshes(2)[name], problem(dtype=dtype), "mixed")


@pytest.mark.parametrize(("name", "data"), [(TP, "images"), (CP, "videos"), (DP, "images")])
def test_uniform_data_on_two_ranks(ranks, mesh, name, data):
    check(ranks, mesh, 2, meshes(2)[name], problem(), data)


@pytest.mark.parametrize(("name", "method"), [(TP, "flow"), (CP, "consistency"), (DP, "flow")])
def test_the_other_methods_on_two_ranks(ranks, mesh, name, method):
    check(ranks, mesh, 2, meshes(2)[name], problem(method, recompute="full"), "mixed")


# --- pipelines: meshes of several stages, under every schedule

PIPELINES = [(world, name, parallel) for world in (2, 4, 8) for name, parallel in pipelines(world).items()]
FAST_PIPELINES = (
    "pp2-tp1-cp1-dp1",
    "pp2-tp1-cp1-dp2",
    "pp2-tp2-sp-cp1-dp1",
    "pp2-tp1-cp2-ulysses-dp1",
    "pp4-tp1-cp1-dp1",
)


def check_pipeline(ranks, mesh, case, config, schedule):
    world, _, parallel = case
    want = reference(mesh, config, "mixed")
    for got in ranks(world).run(iterations, parallel, replace(config, pipeline=SCHEDULES[schedule]), "mixed"):
        if config.model.dtype == "float64":
            compare_exactly(got, want)
        else:
            compare_rounded(got, want, reference(mesh, deep(), "mixed"), **TOLERANCE[config.model.dtype])


def pipeline(name):
    return next(case for case in PIPELINES if case[1] == name)


def test_the_matrix_of_pipelines_is_complete():
    """2 ranks: pp2; 4 ranks: pp2 x (tp2 (2), cp2 (2), dp2), pp4; 8 ranks: pp2 x the 13 of
    four ranks, pp4 x the 5 of two.
    """
    assert [len(pipelines(world)) for world in (2, 4, 8)] == [1, 6, 18]


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c[1] in FAST_PIPELINES else pytest.mark.slow, id=c[1]) for c in PIPELINES],
)
def test_apt_in_a_pipeline(ranks, mesh, case):
    check_pipeline(ranks, mesh, case, deep(), "interleaved")


@pytest.mark.parametrize("schedule", ["line", "zero_bubble", "1f1b", "gpipe"])
def test_every_schedule_computes_the_same(ranks, mesh, schedule):
    check_pipeline(ranks, mesh, pipeline("pp2-tp1-cp1-dp1"), deep(), schedule)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["line", "zero_bubble", "1f1b", "gpipe"])
@pytest.mark.parametrize("case", [pytest.param(c, id=c[1]) for c in PIPELINES if c[0] == 4])
def test_every_schedule_on_four_ranks(ranks, mesh, case, schedule):
    check_pipeline(ranks, mesh, case, deep(), schedule)


@pytest.mark.parametrize(
    ("method", "schedule"), [("flow", "interleaved"), ("consistency", "interleaved"), ("consistency", "1f1b")]
)
def test_the_other_methods_in_a_pipeline(ranks, mesh, method, schedule):
    check_pipeline(ranks, mesh, pipeline("pp2-tp1-cp1-dp1"), deep(method, recompute="full"), schedule)


@pytest.mark.parametrize(
    "change",
    [
        "relativistic",
        "frozen backbone",
        "single modulation",
        "shallow",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "recompute", "unmatched")),
    ],
)
def test_variants_of_apt_in_a_pipeline(ranks, mesh, change):
    config = deep(recompute="full" if change == "recompute" else "none")
    apt = {
        "relativistic": {"loss": "relativistic", "ar2_lambda": 1.0},
        "unmatched": {"unmatched_conditions": True},
        # A rank of a line has nothing to train then
        "frozen backbone": {"train_backbone": False, "head_layers": (1.0,)},
        "shallow": {"discriminator_depth": 0.75, "head_layers": (0.34, 0.67)},
    }
    config = replace(config, apt=replace(config.apt, **apt.get(change, {})))
    if change == "adamw":
        config = replace(config, optimizer=replace(config.optimizer, kind="adamw"))
    if change == "single modulation":
        config = replace(
            config, model=replace(config.model, modulation="single", pooled_text=not config.model.pooled_text)
        )
    check_pipeline(
        ranks,
        mesh,
        pipeline("pp2-tp1-cp1-dp1"),
        config,
        "line" if change == "frozen backbone" else "interleaved",
    )


@pytest.mark.parametrize(
    ("name", "chunks"),
    [
        ("pp2-tp1-cp1-dp1", 1),
        ("pp2-tp1-cp1-dp1", 2),
        pytest.param("pp2-tp2-sp-cp1-dp1", 2, marks=pytest.mark.slow),
    ],
)
def test_reused_fakes_in_a_pipeline(ranks, mesh, name, chunks):
    """One forward of G for two iterations computes what two would."""
    config = deep()
    config = replace(
        config, apt=replace(config.apt, reuse_fakes=True), pipeline=PipelineConfig(chunks=chunks, cap=12.0)
    )
    world, _, parallel = pipeline(name)
    want = reference(mesh, replace(config, pipeline=PipelineConfig()), "mixed")
    (got, forwards), *others = ranks(world).run(with_forwards, parallel, config)
    # Of three microbatches, five a piece without sharing
    assert forwards == chunks * 3 * (5 * ITERATIONS - (ITERATIONS - 1))
    for result in (got, *(other for other, _ in others)):
        compare_exactly(result, want)
    plain = reference(mesh, deep(), "mixed")
    assert want["values"][0] == plain["values"][0] and want["values"][1] != plain["values"][1]


def with_forwards(mesh, config):
    from megatron_apt.schedule import execute

    count, forward = [0], execute._Run._forward

    def counted(self, task, segment, chain):
        count[0] += 1
        forward(self, task, segment, chain)

    execute._Run._forward = counted
    try:
        return iterations(mesh, config, "mixed"), count[0]
    finally:
        execute._Run._forward = forward


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", [FAST_PIPELINES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FAST_PIPELINES[1:])]
)
def test_low_precision_in_a_pipeline(ranks, mesh, name, dtype):
    check_pipeline(ranks, mesh, pipeline(name), deep(dtype=dtype), "interleaved")


# --- deliberate bugs: the harness must notice each, and name a parameter


@contextlib.contextmanager
def replaced(owner, name, value):
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def drop_the_reduction_of_partial_gradients(mesh):
    def reduce(self):
        self._partial = []
        original(self)

    original = ShardedParameters.reduce_gradients
    return replaced(ShardedParameters, "reduce_gradients", reduce)


def drop_the_sum_over_data_ranks(mesh):
    return replaced(DistributedDataParallel, "finish_grad_sync", lambda self, **_: None)


def double_the_gradient_of_gathered_keys(mesh):
    class Doubled(collectives._GatherRows):
        @staticmethod
        def backward(ctx, dy):
            dx, *rest = collectives._GatherRows.backward(ctx, dy)
            return 2 * dx, *rest

    return replaced(context, "gather_rows", lambda x, sizes, axis: Doubled.apply(x, sizes, axis))


def double_the_gradient_over_context_ranks(mesh):
    class Doubled(collectives._Sum):
        @staticmethod
        def backward(ctx, dy):
            dx, rest = collectives._Sum.backward(ctx, dy)
            return 2 * dx, rest

    from megatron_apt.models import discriminator

    return replaced(discriminator, "sum_over", lambda x, axis: Doubled.apply(x, axis.group))


def seed_by_rank(mesh):
    def noise(self, purpose):
        return original(self, f"{purpose} of rank {self.mesh.world.rank}")

    original = Microbatch.noise
    return replaced(Microbatch, "noise", noise)


def average_only_on_the_main_rank(mesh):
    from megatron_apt.training.optimizers import RMSProp

    original = RMSProp.step
    return replaced(RMSProp, "step", lambda self, lr, ema: original(self, lr, ema if mesh.is_main else None))


BUGS = {
    "a dropped all-reduce of sequence-parallel gradients": (
        drop_the_reduction_of_partial_gradients,
        ParallelConfig(tp=2),
        "gradient of",
    ),
    "a dropped reduce-scatter": (drop_the_sum_over_data_ranks, ParallelConfig(), "gradient of"),
    "a doubled gradient of gathered keys": (
        double_the_gradient_of_gathered_keys,
        ParallelConfig(cp=2, context_parallel="all_gather"),
        "gradient of",
    ),
    "a doubled gradient of the query heads": (
        double_the_gradient_over_context_ranks,
        ParallelConfig(cp=2),
        "gradient of",
    ),
    "noise that depends on the rank": (seed_by_rank, ParallelConfig(), "gradient of"),
    "an average kept on one rank only": (
        average_only_on_the_main_rank,
        ParallelConfig(),
        "average of generator",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_deliberate_bug_is_noticed(ranks, mesh, bug):
    defect, parallel, message = BUGS[bug]
    config = problem()
    # So that no reduction is under way when one is dropped
    config = replace(config, optimizer=replace(config.optimizer, overlap=False))
    want = reference(mesh, config, "mixed")
    results = ranks(2).run(iterations, parallel, config, "mixed", defect)
    with pytest.raises(AssertionError, match=message):
        for got in results:
            compare_exactly(got, want)


# --- randomness


def draws(mesh, data):
    from megatron_apt.data.batches import deal
    from support.parity import _samples

    parts = deal(6, 2, mesh.dp.size, mesh.dp.rank)
    found = {}
    for first, size in parts:
        batch = _samples(mesh, problem(), data, 3, first, size).for_phase("d")
        noise, uniform = batch.noise("ar1"), batch.uniform("t_real")
        for i, position in enumerate(batch.positions.tolist()):
            found[position] = (noise[batch.layout.visual.sample == i], float(uniform[i]))
    return mesh.cp.rank, found


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(), ParallelConfig(cp=2), ParallelConfig(tp=2)], ids=["dp2", "cp2", "tp2"]
)
def test_each_rank_draws_its_slice_of_the_same_noise(ranks, mesh, parallel):
    _, want = draws(mesh, "mixed")
    assert derive_key(7, 3, "d", "ar1") != derive_key(7, 3, "g", "ar1")
    seen: dict[int, list] = {}
    for cp_rank, found in ranks(2).run(draws, parallel, "mixed"):
        for position, (noise, uniform) in found.items():
            assert uniform == want[position][1]
            seen.setdefault(position, []).append((cp_rank, noise))
    assert seen.keys() == want.keys()
    for position, parts in seen.items():
        joined = (
            torch.cat([noise for _, noise in sorted(parts, key=lambda part: part[0])])
            if parallel.cp > 1
            else parts[0][1]
        )
        assert torch.equal(joined, want[position][0])
