import math

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.datasets import load_digits

from megatron_apt.evaluate.classifier import ClassAccuracy
from megatron_apt.evaluate.diversity import pairwise_diversity
from megatron_apt.evaluate.frechet import frechet_distance, pixel_features, pooled_features, real_floor


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(n: int, mean: torch.Tensor, std: torch.Tensor, seed: int) -> torch.Tensor:
    """(n, d) samples whose empirical mean and (diagonal) covariance are exactly these."""
    x = normal(n, len(mean), seed=seed)
    orthonormal = torch.linalg.qr(x - x.mean(0)).Q
    return mean + orthonormal * math.sqrt(n - 1) * std


def scipy_frechet(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return (
        ((a.mean(0) - b.mean(0)) ** 2).sum()
        + np.trace(cov_a + cov_b)
        - 2 * np.trace(scipy.linalg.sqrtm(cov_a @ cov_b)).real
    )


def test_frechet_of_diagonal_gaussians_in_closed_form():
    mean_a, mean_b = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 0.5]], dtype=torch.float64)
    std_a, std_b = torch.tensor([[1.0, 2.0, 0.1], [3.0, 2.0, 0.4]], dtype=torch.float64)
    known = (1 + 9 + 0) + (2**2 + 0 + 0.3**2)
    got = frechet_distance(with_moments(50, mean_a, std_a, 1), with_moments(70, mean_b, std_b, 2))
    assert got == pytest.approx(known, rel=1e-12)


def test_frechet_agrees_with_scipy_sqrtm():
    a = normal(200, 12) @ normal(12, 12, seed=1)
    b = normal(150, 12, seed=2) @ normal(12, 12, seed=3) + 0.3
    assert frechet_distance(a, b) == pytest.approx(scipy_frechet(a.numpy(), b.numpy()), rel=1e-10)


def test_frechet_invariances():
    a, b = normal(80, 6) * 2, normal(90, 6, seed=1) + 1
    distance = frechet_distance(a, b)
    rotation = torch.linalg.qr(normal(6, 6, seed=2)).Q
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-12)
    assert frechet_distance(a @ rotation + 5, b @ rotation + 5) == pytest.approx(distance, rel=1e-11)
    assert frechet_distance(a[torch.randperm(80)], b) == pytest.approx(distance, rel=1e-12)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * distance, rel=1e-12)
    assert frechet_distance(a, a + 2) == pytest.approx(4 * 6, rel=1e-10)


def test_frechet_of_itself_is_zero_even_where_the_data_does_not_vary():
    # 5 samples of 40 features, half of them constant: 36 eigenvalues are rounding noise.
    x = torch.cat([normal(5, 20) * 100, torch.full((5, 20), 7.0, dtype=torch.float64)], 1)
    assert frechet_distance(x, x) < 1e-9
    assert frechet_distance(x, x.float() + 0) < 1e-6
    assert frechet_distance(torch.ones(3, 2), torch.ones(3, 2)) == 0


def test_floor_is_small_reproducible_and_falls_with_more_data():
    x = normal(2000, 8)
    assert real_floor(x, seed=3) == real_floor(x, seed=3) != real_floor(x, seed=4)
    assert 0 < real_floor(x, 0) < 0.1 < real_floor(x[:60], 0)
    assert real_floor(x, 0) < 0.1 * frechet_distance(x, x + 0.5)
    # Disjoint halves: no sample is in both, so even distinct constants differ.
    assert real_floor(torch.arange(4.0)[:, None], 0) > 0


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(4, 3), "N >= 2"),
        (torch.zeros(4, 3, 1), torch.zeros(4, 3), "N >= 2"),
        (torch.zeros(4, 3), torch.full((4, 3), float("nan")), "features_b: 4 of 4 samples are not finite"),
        (torch.zeros(4, 3), torch.zeros(4, 2), "3 and 2 wide"),
    ],
)
def test_frechet_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_floor_refuses_three_samples():
    with pytest.raises(ValueError, match="at least 4"):
        real_floor(torch.zeros(3, 2), 0)


def test_features():
    x = normal(2, 3, 2, 4, 6)
    assert torch.equal(pixel_features(x), x.reshape(2, -1))
    pooled = pooled_features(x, 2).reshape(2, 3, 2, 2, 3)
    assert pooled[1, 2, 1, 1, 2] == pytest.approx(x[1, 2, 1, 2:4, 4:6].mean().item())
    with pytest.raises(ValueError, match="4x6 does not split into 4x4"):
        pooled_features(x, 4)


def test_classifier_on_digits():
    digits = load_digits()
    x, y = torch.tensor(digits.data) / 8 - 1, torch.tensor(digits.target)
    accuracy = ClassAccuracy.fit(x, y)
    assert 0.95 < accuracy.real_accuracy <= 1
    assert accuracy.score(x, y) > 0.97
    assert accuracy.score(x, (y + 1) % 10) < 0.02
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    assert accuracy.score(x, shuffled) == pytest.approx(0.1, abs=0.03)
    assert accuracy.score(x + 0.05 * normal(*x.shape), y) > 0.97
    assert ClassAccuracy.fit(x, y).real_accuracy == accuracy.real_accuracy


def test_real_accuracy_is_held_out():
    # Random labels: nothing to learn, so a score on the training samples would be far above chance.
    x, y = normal(400, 300), torch.arange(400) % 2
    accuracy = ClassAccuracy.fit(x, y)
    assert accuracy.real_accuracy < 0.7 < accuracy.score(x, y)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(4, 2), torch.zeros(3), "give"),
        (torch.zeros(4, 2), torch.zeros(4), "at least 2 classes"),
        (torch.zeros(3, 2), torch.tensor([0, 0, 1]), "at least 2 samples"),
        (torch.full((4, 2), float("inf")), torch.tensor([0, 0, 1, 1]), "finite"),
    ],
)
def test_classifier_refuses(x, y, message):
    with pytest.raises(ValueError, match=message):
        ClassAccuracy.fit(x, y)


def test_diversity():
    x = normal(7, 3, 2, 4)
    pairs = [(x[i] - x[j]).square().mean().sqrt().item() for i in range(7) for j in range(i)]
    assert pairwise_diversity(x) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)
    assert pairwise_diversity(x[:1].expand(5, -1, -1, -1)) == 0
    assert pairwise_diversity(normal(200, 1000)) == pytest.approx(math.sqrt(2), rel=0.01)
    assert math.isnan(pairwise_diversity(torch.full((2, 3), float("nan"))))
    with pytest.raises(ValueError, match="at least 2"):
        pairwise_diversity(x[:1])
