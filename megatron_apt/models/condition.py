"""What a model is told about each sample besides its noise and its time."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Text conditions of a microbatch, whole on every rank: packed tokens (sum of lengths, E), their lengths, and each sample's mean (n, E)."""

    tokens: Tensor
    lengths: tuple[int, ...]
    pooled: Tensor

    @staticmethod
    def pack(texts: list[Tensor], length: int = 0) -> "Condition":
        """From one (length_i, E) embedding per sample, each cut or padded with zeros to `length` tokens unless that is 0.

        Means are over each caption's own tokens, before padding.
        """
        tokens, lengths = torch.cat(texts), torch.tensor([len(t) for t in texts])
        sample = torch.repeat_interleave(torch.arange(len(texts)), lengths)
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
        return Condition(self.tokens.repeat(n, 1), self.lengths * n, self.pooled.repeat(n, 1))

    def to(self, device: torch.device) -> "Condition":
        return Condition(self.tokens.to(device), self.lengths, self.pooled.to(device))

    def join(self, other: "Condition") -> "Condition":
        """The samples of both, one after the other."""
        return Condition(torch.cat((self.tokens, other.tokens)), self.lengths + other.lengths, torch.cat((self.pooled, other.pooled)))
