"""Which rows of a packed tensor belong to which sample, and sums over them.

Letters: R rows, n samples, B blocks. A block is a run of at most `size` rows of one
sample; a program of a kernel works on one block, so it loads its sample's vectors once,
and the parts of a sum over a sample's rows are added in a fixed order: results do not
depend on timing.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_apt.kernels.launch import jit, launch, tl


@dataclass(frozen=True, eq=False)
class Blocks:
    table: Tensor  # (B, 3) int32: sample, first row, row behind the last
    first: Tensor  # (n + 1,) int32: the blocks of sample i are first[i] .. first[i + 1]
    size: int

    def __len__(self) -> int:
        return len(self.table)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of n samples, one sample after another.

    Attributes:
        offsets: n + 1 numbers: the rows of sample i are offsets[i] .. offsets[i + 1],
            none if they are equal.
        sample: (a,) sample of each entry of the first dimension of the (a, b, ...)
            tensors meant, or (a, b) where that differs inside an entry; None: entry i is
            sample i.
    """

    offsets: tuple[int, ...]
    device: torch.device
    sample: Tensor | None = None
    _blocks: dict[int, Blocks] = field(default_factory=dict)

    @staticmethod
    def packed(lengths: list[int] | tuple[int, ...], device: torch.device | str = "cpu") -> "Rows":
        """Rows of (T, 1, ...) tensors with so many rows of each sample."""
        offsets = torch.tensor([0, *lengths]).cumsum(0).tolist()
        sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
        return Rows(tuple(offsets), torch.device(device), sample)

    @staticmethod
    def uniform(samples: int, length: int, device: torch.device | str = "cpu") -> "Rows":
        """Rows of (n, s, ...) tensors."""
        return Rows(tuple(i * length for i in range(samples + 1)), torch.device(device))

    @property
    def samples(self) -> int:
        return len(self.offsets) - 1

    @property
    def total(self) -> int:
        return self.offsets[-1]

    def expand(self, values: Tensor) -> Tensor:
        """(n, ...) per-sample values -> (a, 1, ...), which broadcasts over (a, b, ...)
        tensors, or (a, b, ...).
        """
        if self.sample is None:
            return values.unsqueeze(1)
        if self.sample.dim() == 1:
            return values.index_select(0, self.sample).unsqueeze(1)
        return values.index_select(0, self.sample.flatten()).unflatten(0, self.sample.shape)

    def blocks(self, size: int) -> Blocks:
        """Every sample's rows cut into blocks of `size`; made once."""
        if size not in self._blocks:
            table, first = [], [0]
            for i, (start, stop) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
                table += [(i, a, min(a + size, stop)) for a in range(start, stop, size)]
                first.append(len(table))
            entries = torch.tensor(table, dtype=torch.int32).view(-1, 3)
            self._blocks[size] = Blocks(
                entries.to(self.device), torch.tensor(first, dtype=torch.int32).to(self.device), size
            )
        return self._blocks[size]


@jit
def _sum_blocks(parts, first, out, width, TILE_B: tl.constexpr, TILE_W: tl.constexpr):
    sample = tl.program_id(0)
    column = tl.program_id(1) * TILE_W + tl.arange(0, TILE_W)
    begin, end = tl.load(first + sample), tl.load(first + sample + 1)
    total = tl.zeros((TILE_W,), tl.float32)
    for b in range(begin, end, TILE_B):
        block = b + tl.arange(0, TILE_B)
        mask = (block < end)[:, None] & (column < width)[None, :]
        tile = tl.load(parts + block[:, None].to(tl.int64) * width + column[None, :], mask=mask, other=0.0)
        total += tl.sum(tile, 0)
    tl.store(out + sample.to(tl.int64) * width + column, total, mask=column < width)


def sum_blocks(parts: Tensor, blocks: Blocks) -> Tensor:
    """(B, ...) fp32 sums over each block's rows -> (n, ...) over each sample's, in the
    order of the blocks.
    """
    out = parts.new_empty(len(blocks.first) - 1, *parts.shape[1:])
    width = parts[0].numel() if len(parts) else out[0].numel()
    launch(_sum_blocks, (len(out), -(-width // 64)), parts, blocks.first, out, width, TILE_B=64, TILE_W=64)
    return out
