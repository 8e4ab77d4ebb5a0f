"""Failures a user can act on: shown as one message, without a traceback."""

from megatron_apt.guards import BadLoss, Collapse
from megatron_apt.networks import BadGradient

EXPECTED = (ValueError, FileNotFoundError, ImportError, BadLoss, BadGradient, Collapse)
