"""Wan2.2 TI2V: a given first frame among the noisy ones, at time 0. Against diffusers, methods, meshes, samplers, the whole way, refusals."""

import pytest
from families import CONFIGS, compare
from parity import meshes
from test_convert_models import assert_equal

SEEDS = range(6)
UNIFORM = [(3, 3, 5)] * 3, [5] * 3
# Of one length but not of one grid; and a picture, which has no first frame, between clips.
ALIKE = [(2, 3, 4), (4, 3, 2), (3, 2, 4)], [5] * 3
PACKED = [(2, 3, 5), (1, 4, 3), (4, 2, 2)], [4, 7, 5]


def config_of(seed: int) -> dict:
    """A random shape with patches of one frame and without image tokens; some have given channels too."""
    config = CONFIGS["wan"](seed)
    return config | {"patch_size": (1, *config["patch_size"][1:]), "image_dim": None, "added_kv_proj_dim": None}


def compared(mesh, seed: int, problem, **options):
    return compare(mesh, "wan", config_of(seed), *problem, first_frame=True, **options)


@pytest.mark.parametrize("seed", SEEDS)
def test_velocities_and_gradients_equal_those_of_diffusers(mesh, seed):
    """fp32, every weight; diffusers is given a time for every token."""
    assert_equal(compared(mesh, seed, UNIFORM))
    assert_equal(compared(mesh, seed, ALIKE))
    assert_equal(compared(mesh, seed, PACKED, recompute="full"))


def test_with_kernels(mesh):
    assert_equal(compared(mesh, 0, PACKED, kernels=True))
    assert_equal(compared(mesh, 0, ALIKE, kernels=True))


def on_mesh(mesh, seed: int):
    even = tuple(values[:2] for values in UNIFORM)
    return [compared(mesh, seed, problem) for problem in (even, tuple(values[:2] for values in ALIKE), PACKED)]


SPLIT = {name: parallel for name, parallel in meshes(2).items() if parallel.tp * parallel.cp == 2}


@pytest.mark.dist
@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_mesh_equals_diffusers(ranks, name, seed):
    for errors in ranks(2).run(on_mesh, SPLIT[name], seed):
        for one in errors:
            assert_equal(one)
