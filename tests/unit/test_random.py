"""Keyed noise and sample order: pure functions of their keys."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_apt.data.order import SampleOrder
from megatron_apt.kernels.keyed_noise import _philox, derive_key, keyed_normal, keyed_uniform


def test_philox_gives_numpys_numbers():
    key = derive_key(1, 2, "x")
    counters = torch.tensor([1, 5, 2**40 + 3])
    ours = torch.stack(_philox(key, counters, torch.tensor([0, 7, 2**35])), dim=-1)
    # numpy's Philox is 4x64; the 4x32 reference vector of the Random123 distribution:
    zero = torch.stack(_philox(0, torch.tensor([0]), torch.tensor([0])), dim=-1)[0].tolist()
    assert [f"{w:08x}" for w in zero] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = torch.stack(_philox(2**64 - 1, torch.tensor([-1]), torch.tensor([-1])), dim=-1)[0].tolist()
    assert [f"{w & 0xFFFFFFFF:08x}" for w in ones] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    assert ours.min() >= 0 and ours.max() < 2**32


@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_any_slice_equals_the_whole(start, count, sample):
    key, ids = derive_key("slice"), torch.tensor([sample, 3])
    assert torch.equal(keyed_normal(key, ids, count, start), keyed_normal(key, ids, start + count)[:, start:])
    assert torch.equal(
        keyed_uniform(key, ids, count, start), keyed_uniform(key, ids, start + count)[:, start:]
    )


def test_a_sample_does_not_see_its_neighbours():
    key = derive_key(0, 1, "g", "z")
    whole = keyed_normal(key, torch.arange(10), 64)
    assert torch.equal(whole[[7, 2]], keyed_normal(key, torch.tensor([7, 2]), 64))
    assert not torch.equal(whole, keyed_normal(derive_key(0, 1, "d", "z"), torch.arange(10), 64))


def test_normal_numbers_are_normal():
    x = keyed_normal(derive_key("moments"), torch.arange(1000), 1000).double()
    # A million numbers: standard errors 0.001, 0.0014, 0.0024, 0.005.
    assert float(x.mean()) == pytest.approx(0, abs=0.005)
    assert float(x.var()) == pytest.approx(1, abs=0.007)
    assert float((x**3).mean()) == pytest.approx(0, abs=0.012)
    assert float((x**4).mean()) == pytest.approx(3, abs=0.025)
    correlations = torch.corrcoef(x[:, :8].T) - torch.eye(8)
    assert float(correlations.abs().max()) < 0.15


def test_uniform_numbers_fill_the_open_interval():
    u = keyed_uniform(derive_key("u"), torch.arange(1000), 1000)
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    counts = np.histogram(u.numpy(), bins=10, range=(0, 1))[0]
    assert abs(counts - 100_000).max() < 1500


def test_an_epoch_shows_every_sample_once():
    order = SampleOrder([10], [1], block=4, seed=3)
    first = [order.at(p)[1] for p in range(10)]
    second = [order.at(p)[1] for p in range(10, 20)]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_a_mixture_keeps_its_weights_and_covers_each_dataset():
    order = SampleOrder([6, 4], [3, 1], block=2, seed=0)
    places = [order.at(p) for p in range(3 * 24)]
    assert [source for source, _ in places[:8:2]].count(0) == 3
    for source, size in ((0, 6), (1, 4)):
        indices = [index for s, index in places if s == source]
        assert sorted(indices[:size]) == list(range(size))


def test_order_does_not_depend_on_who_asks():
    a, b = (SampleOrder([50, 7], [2, 1], block=8, seed=1) for _ in range(2))
    forward = [a.at(p) for p in range(200)]
    assert [b.at(p) for p in reversed(range(200))] == forward[::-1]
    assert forward != [SampleOrder([50, 7], [2, 1], block=8, seed=2).at(p) for p in range(200)]
