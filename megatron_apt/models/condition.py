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
        pooled: (n, E) mean of each sample's text, or what its text encoder gives for the
            whole caption, which may have another width.
        visual: further channels of every visual token, packed (sum of visual lengths, C *
            patch), as `patchify` orders them.
        image: (n, L, E) tokens of an image encoder.
        first: clean latents of the first frame of every clip (not of a sample of one
            frame), packed (sum of their tokens, C * patch).
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    pooled: Tensor
    visual: Tensor | None = None
    image: Tensor | None = None
    first: Tensor | None = None

    @staticmethod
    def pack(texts: list[Tensor], length: int = 0, pooled: Tensor | None = None) -> "Condition":
        """From one (length_i, E) embedding per sample, each cut or padded with zeros to
        `length` tokens unless that is 0.

        Without `pooled` that is the mean over each caption's own tokens, before padding.
        """
        tokens, lengths = torch.cat(texts), torch.tensor([len(t) for t in texts])
        sample = torch.repeat_interleave(torch.arange(len(texts)), lengths)
        if pooled is None:
            pooled = tokens.new_zeros(len(texts), tokens.shape[1]).index_add(0, sample, tokens) / lengths[
                :, None
            ].to(tokens.dtype)
        if not length:
            return Condition(tokens, tuple(lengths.tolist()), pooled)
        place = torch.arange(len(tokens)) - (lengths.cumsum(0) - lengths)[sample]
        kept = place < length
        fitted = tokens.new_zeros(len(texts) * length, tokens.shape[1])
        fitted[(sample * length + place)[kept]] = tokens[kept]
        return Condition(fitted, (length,) * len(texts), pooled)

    def repeat(self, n: int) -> "Condition":
        """A single sample's condition for n samples."""
        repeated = {
            name: value.repeat(n, *(1,) * (value.dim() - 1))
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, lengths=self.lengths * n, **repeated)

    def to(self, device: torch.device) -> "Condition":
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def join(self, other: "Condition") -> "Condition":
        """The samples of both, one after the other."""
        both = {
            name: torch.cat((value, getattr(other, name)))
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, lengths=self.lengths + other.lengths, **both)

    def over(self, x: Tensor, layout: Layout) -> Tensor:
        """This rank's visual tokens (T, P) with the given first frames in the place of
        x's own, which then get no gradient.

        Raises:
            ValueError: first frames of other sizes than the samples'.
        """
        if self.first is None:
            return x
        if len(self.first) != sum(layout.first.lengths):
            raise ValueError(
                f"given first frames have {len(self.first)} tokens, those of the samples "
                f"{layout.first.lengths}; encode them in their size"
            )
        return x.index_copy(0, layout.first.local, self.first.to(x.dtype).index_select(0, layout.first.index))

    def beside(self, x: Tensor, layout: Layout) -> Tensor:
        """This rank's visual tokens (T, P) with their given channels after the latent's own."""
        return (
            x
            if self.visual is None
            else torch.cat((x, self.visual.to(x.dtype).index_select(0, layout.visual.index)), dim=1)
        )
