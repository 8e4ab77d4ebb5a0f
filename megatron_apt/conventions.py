"""The conventions of the method, in one place.

x is a clean latent, z ~ N(0, I) noise, t in [0, 1] with t = 1 pure noise. Path x_t = (1 -
t) x + t z, velocity v = z - x (APT paper, eq. 3-5). Every function works on any shape; t
must broadcast against x.
"""

from torch import Tensor


def interpolate(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t z."""
    return (1 - t) * x + t * z


def velocity_target(x: Tensor, z: Tensor) -> Tensor:
    """v = z - x."""
    return z - x


def predict_sample(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x_hat = x_t - t v; the consistency function f(x_t, t), for which f(x, 0) = x
    whatever the network says.
    """
    return x_t - t * v


def one_step_sample(z: Tensor, v: Tensor) -> Tensor:
    """G(z, c) = z - v(z, c, t = 1)."""
    return z - v


def shift(t, s: float):
    """shift(t, s) = s t / (1 + (s - 1) t), for t in [0, 1] (eq. 7).

    On t in [0, 1000] it would give about s / (s - 1) for nearly every t: the collapse
    case t = 0. Hence this package has no such scale.
    """
    return s * t / (1.0 + (s - 1.0) * t)
