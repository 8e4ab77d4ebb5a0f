"""Losses as pure functions, each beside its equation. Logits are (n,) and at least fp32;
results are per sample, (n,), unless said otherwise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """(a - b)^2, elementwise, in at least fp32."""
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(wide) - target.to(wide)).square()


def non_saturating_d_real(logit: Tensor) -> Tensor:
    """-log sigmoid(D(x)) = softplus(-D(x))."""
    return F.softplus(-logit)


def non_saturating_d_fake(logit: Tensor) -> Tensor:
    """-log(1 - sigmoid(D(x_hat))) = softplus(D(x_hat))."""
    return F.softplus(logit)


def non_saturating_g(logit: Tensor) -> Tensor:
    """-log sigmoid(D(x_hat)) = softplus(-D(x_hat))."""
    return F.softplus(-logit)


def hinge_d_real(logit: Tensor) -> Tensor:
    """max(0, 1 - D(x))."""
    return F.relu(1 - logit)


def hinge_d_fake(logit: Tensor) -> Tensor:
    """max(0, 1 + D(x_hat))."""
    return F.relu(1 + logit)


def hinge_g(logit: Tensor) -> Tensor:
    """-D(x_hat)."""
    return -logit


def relativistic_d(real: Tensor, fake: Tensor) -> Tensor:
    """-log sigmoid(D(x) - D(x_hat)) (Jolicoeur-Martineau 2018, pairs)."""
    return F.softplus(fake - real)


def relativistic_g(real: Tensor, fake: Tensor) -> Tensor:
    """-log sigmoid(D(x_hat) - D(x))."""
    return F.softplus(real - fake)


def approximate_r1(logit: Tensor, perturbed: Tensor) -> Tensor:
    """aR1 = (D(x) - D(x + sigma n))^2 (APT paper, eq. 9); gradients flow through both
    terms. On fakes it is aR2.

    To first order its mean over n is sigma^2 ||grad_x D||^2.
    """
    return (logit - perturbed).square()
