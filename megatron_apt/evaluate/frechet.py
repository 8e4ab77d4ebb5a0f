"""Frechet distance between two sets of features, each taken as a Gaussian.

    FD = |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

The number depends on the features and, as an estimate from samples, is biased upwards at
small N: compare only distances over the same features and similar N, and print
`real_floor` beside them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Distance of (N, d) from (M, d) in float64, in squared units of the features;
    covariances are unbiased (N - 1).

    Raises ValueError for fewer than 2 samples, different widths or values that are not
    finite.
    """
    a, b = _checked(features_a, "features_a"), _checked(features_b, "features_b")
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features are {a.shape[1]} and {b.shape[1]} wide; compute both with the same function at the "
            "same size"
        )
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    # tr (C_a C_b)^(1/2) is the sum of singular values of R_a R_b^T with C = R^T R. The
    # usual square root of the eigenvalues of C_a C_b would turn rounding noise of 1e-16
    # into 1e-8 for every direction in which the data does not vary.
    overlap = torch.linalg.svdvals(root_a @ root_b.T).sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    distance = mean + root_a.square().sum() + root_b.square().sum() - 2 * overlap
    return max(distance.item(), 0.0)


def real_floor(features: Tensor, seed: int) -> float:
    """Distance between two disjoint random halves of (N, d) real features: what a perfect
    generator would score with N / 2 samples.
    """
    if len(features) < 4:
        raise ValueError(f"{len(features)} samples do not make two halves of at least 2; give at least 4")
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(features.device)
    half = len(features) // 2
    return frechet_distance(features[order[:half]], features[order[half : 2 * half]])


def pixel_features(x: Tensor) -> Tensor:
    """(N, C, F, H, W) -> (N, C F H W)."""
    return x.flatten(1)


def pooled_features(x: Tensor, pool: int = 2) -> Tensor:
    """(N, C, F, H, W) -> (N, C F (H / pool) (W / pool)): spatial means, so that d stays
    well under N for latents of clips.
    """
    height, width = x.shape[-2:]
    if height % pool or width % pool:
        raise ValueError(
            f"{height}x{width} does not split into {pool}x{pool} squares; use a pool that divides both sides"
        )
    return F.avg_pool3d(x, (1, pool, pool)).flatten(1)


def _checked(features: Tensor, name: str) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{name} is {tuple(features.shape)}; give (N, d) with N >= 2")
    bad = len(features) - int(features.isfinite().all(1).sum())
    if bad:
        raise ValueError(
            f"{name}: {bad} of {len(features)} samples are not finite; the generator diverged, or the "
            "features overflowed"
        )
    return features.detach().double()


def _covariance_root(features: Tensor) -> Tensor:
    """R (d, d) with R^T R = covariance of (N, d)."""
    centred = features - features.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(features) - 1))
    # Below this an eigenvalue is rounding noise, whose root would not be small.
    values = torch.where(values > values[-1] * len(values) * torch.finfo(values.dtype).eps, values, 0.0)
    return values.sqrt()[:, None] * vectors.T
