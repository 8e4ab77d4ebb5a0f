"""What a run would need and cost, before a cluster is booked."""

from megatron_apt.moved import names_of

__getattr__ = names_of(__name__)
