"""Failures a user can act on: shown as one message, without a traceback."""

from megatron_apt.networks import BadGradient
from megatron_apt.pipeline.execute import BadLoss
from megatron_apt.train import Collapse

EXPECTED = (ValueError, FileNotFoundError, ImportError, BadLoss, BadGradient, Collapse)
