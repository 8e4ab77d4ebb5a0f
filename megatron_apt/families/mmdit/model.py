"""MMDiT (Esser et al. 2024), with rotary positions in place of a table."""

from megatron_apt.models.joint import JointTransformer


class MMDiT(JointTransformer):
    """v = model(x_t, t, condition) of text and visual tokens with weights of their own."""


MODEL = MMDiT
