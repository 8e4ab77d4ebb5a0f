"""Training methods, each a list of phases: which networks see which data. They know no
loop, no rank and no schedule.
"""

from megatron_apt.methods import apt, consistency, flow

METHODS = {"flow": flow.method, "consistency": consistency.method, "apt": apt.method}
