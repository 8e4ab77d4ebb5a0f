"""Failures a user can act on: shown as one message, without a traceback."""

from megatron_apt.guards import Collapse
from megatron_apt.networks import BadGradient
from megatron_apt.pipeline.execute import BadLoss

EXPECTED = (ValueError, FileNotFoundError, ImportError, BadLoss, BadGradient, Collapse)
