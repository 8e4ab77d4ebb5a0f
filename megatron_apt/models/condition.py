"""What a model is told about each sample besides its noise and its time."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_apt.models.layout import Layout


@dataclass(frozen=True)
class Condition:
    """Conditions of a microbatch of n samples, whole on every rank.

    Attributes:
        tokens: packed text (sum of lengths, E).
        lengths: text tokens of each sample.
        pooled: (n, E) mean of each sample's text, or what its text encoder gives for the whole caption, which may have another width.
        visual: further channels of every visual token, packed (sum of visual lengths, C * patch), as `patchify` orders them.
        image: (n, L, E) tokens of an image encoder.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    pooled: Tensor
    visual: Tensor | None = None
    image: Tensor | None = None

    @staticmethod
    def pack(texts: list[Tensor], length: int = 0, pooled: Tensor | None = None) -> "Condition":
        """From one (length_i, E) embedding per sample, each cut or padded with zeros to `length` tokens unless that is 0.

        Without `pooled` that is the mean over each caption's own tokens, before padding.
        """
        tokens, lengths = torch.cat(texts), torch.tensor([len(t) for t in texts])
        sample = torch.repeat_interleave(torch.arange(len(texts)), lengths)
        if pooled is None:
            pooled = tokens.new_zeros(len(texts), tokens.shape[1]).index_add(0, sample, tokens) / lengths[:, None].to(tokens.dtype)
        if not length:
            return Condition(tokens, tuple(lengths.tolist()), pooled)
        place = torch.arange(len(tokens)) - (lengths.cumsum(0) - lengths)[sample]
        kept = place < length
        fitted = tokens.new_zeros(len(texts) * length, tokens.shape[1])
        fitted[(sample * length + place)[kept]] = tokens[kept]
        return Condition(fitted, (length,) * len(texts), pooled)

    def repeat(self, n: int) -> "Condition":
        """A single sample's condition for n samples."""
        visual, image = self.visual, self.image
        return Condition(
            self.tokens.repeat(n, 1),
            self.lengths * n,
            self.pooled.repeat(n, 1),
            None if visual is None else visual.repeat(n, 1),
            None if image is None else image.repeat(n, 1, 1),
        )

    def to(self, device: torch.device) -> "Condition":
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def join(self, other: "Condition") -> "Condition":
        """The samples of both, one after the other."""
        both = {name: torch.cat((value, getattr(other, name))) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, lengths=self.lengths + other.lengths, **both)

    def beside(self, x: Tensor, layout: Layout) -> Tensor:
        """This rank's visual tokens (T, P) with their given channels after the latent's own."""
        return x if self.visual is None else torch.cat((x, self.visual.to(x.dtype).index_select(0, layout.visual.index)), dim=1)
