"""How different samples are from each other. A collapsed generator makes the same picture from every seed."""

import torch
from torch import Tensor


def pairwise_diversity(x: Tensor) -> float:
    """Mean over all pairs of (N, ...) samples of their root-mean-square difference, in
    units of x; NaN if x is not finite.

    Independent samples of variance 1 give about sqrt(2); near 0 is collapse.
    """
    if len(x) < 2:
        raise ValueError(f"{len(x)} sample has no pairs; give at least 2")
    flat = x.detach().flatten(1).double()
    return (torch.pdist(flat).mean() / flat.shape[1] ** 0.5).item()
