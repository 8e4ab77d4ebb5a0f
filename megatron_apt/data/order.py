"""The order of samples: a pure function of (seed, epoch, position), so it survives a
restart and any number of ranks.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from megatron_apt.kernels.keyed_noise import derive_key


@lru_cache(maxsize=8)
def permutation(seed: int, source: int, epoch: int, size: int) -> np.ndarray:
    """Shuffled indices of one epoch of one dataset."""
    return np.random.Generator(np.random.Philox(key=derive_key(seed, "order", source, epoch))).permutation(
        size
    )


class SampleOrder:
    """An endless stream of (dataset, index), in blocks that come from one dataset each.

    Args:
        sizes: samples of each dataset.
        weights: blocks of each dataset in one turn of the mixture.
        block: samples of one block.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[int], block: int, seed: int):
        self.sizes, self.block, self.seed, self.weights = tuple(sizes), block, seed, tuple(weights)
        # Spread each dataset evenly over the turn: 1 of a and 3 of b become b a b b.
        marks = sorted(((k + 0.5) / w, s) for s, w in enumerate(self.weights) for k in range(w))
        self.turn = tuple(source for _, source in marks)

    def at(self, position: int) -> tuple[int, int]:
        """(dataset, index in it) of the sample at a position of the stream."""
        block, offset = divmod(position, self.block)
        turn, place = divmod(block, len(self.turn))
        source = self.turn[place]
        earlier = turn * self.weights[source] + self.turn[:place].count(source)
        epoch, index = divmod(earlier * self.block + offset, self.sizes[source])
        return source, int(permutation(self.seed, source, epoch, self.sizes[source])[index])
