"""megatron_apt: adversarial post-training of large video diffusion transformers on Megatron-Core."""

import sys as _sys

from megatron_apt.training import signals as _signals

if _signals.starts_training(_sys.argv):  # before the imports that take seconds
    _signals.stand()

from megatron_apt.moved import install as _install_moved
from megatron_apt.parallel.megatron_cpu import install as _install_megatron_cpu

__version__ = "0.1.0"

# Must stand before the first import of megatron.core; does nothing until then, and
# nothing at all where there is CUDA.
_install_megatron_cpu()
_install_moved()
