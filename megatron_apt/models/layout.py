"""Where every token of a packed microbatch lives: which sample, which rank, which
attention range.

Letters: n samples, T tokens on this rank, s tokens of each sample when all are equal, D
width, H local heads, K head size.

A microbatch is one sequence per stream, samples one after another. Context parallelism
gives each rank one contiguous chunk of EVERY sample; chunks may be uneven. Hidden states
have two forms, and per-sample vectors broadcast over both:
    uniform   (n, s, D)   all samples equally long (the fast path: attention is a plain batch)
    packed    (T, 1, D)   anything else
Sequence parallelism splits the first dimension of either form over the tensor-parallel
ranks.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megatron_apt.kernels.rows import Rows
from megatron_apt.parallel.mesh import Mesh

Grid = tuple[int, int, int]  # tokens of a sample over (frames, rows, columns)


@dataclass(frozen=True, eq=False)
class Stream:
    """Tokens of one kind (visual or text) of a microbatch, as this rank holds them."""

    lengths: tuple[int, ...]  # tokens of each sample, over all ranks
    counts: tuple[int, ...]  # tokens of each sample on this rank
    index: Tensor  # (T,) position of each local token in the whole packed sequence
    sample: Tensor  # (T,) sample of each local token
    uniform: bool
    # Rows added at the end of the packed form so that it splits over the tensor-parallel
    # ranks in multiples of mesh.row_multiple
    padding: int
    # Of this rank's (sequence-parallel) part of the folded form; padding counts to the
    # last sample
    rows: Rows
    whole: Rows  # of the whole folded form, as gathered over the tensor-parallel ranks; without padding

    def fold(self, x: Tensor) -> Tensor:
        """(T, ...) -> (n, s, ...) or (T + padding, 1, ...)."""
        if self.uniform:
            return x.unflatten(0, (len(self.counts), self.counts[0]))
        if self.padding:
            x = torch.cat((x, x.new_zeros(self.padding, *x.shape[1:])))
        return x.unsqueeze(1)

    def folded(self, width: int, tp: int) -> tuple[int, ...]:
        """Shape of a folded (T, width) tensor whose first dimension is split over `tp` ranks."""
        if self.uniform:
            return len(self.counts) // tp, self.counts[0], width
        return (len(self.index) + self.padding) // tp, 1, width

    def unfold(self, x: Tensor) -> Tensor:
        """Inverse of `fold`."""
        x = x.flatten(0, 1)
        return x[: len(x) - self.padding] if self.padding else x


@dataclass(frozen=True, eq=False)
class Order:
    """A permutation of rows that brings samples of equal length together."""

    rows: Tensor
    back: Tensor  # its inverse

    @staticmethod
    def of(rows: list[Tensor], device: torch.device) -> "Order":
        order = torch.cat(rows)
        return Order(order.to(device), torch.argsort(order).to(device))


@dataclass(frozen=True)
class AttentionGroup:
    """Samples of equal length, next to each other once rows are in order: how many, and
    how many queries and keys each has.
    """

    samples: int
    queries: int
    keys: int


@dataclass(frozen=True, eq=False)
class FirstFrames:
    """The tokens of each clip's first frame, as image-to-video models are given them
    (model.first_frame).

    A sample of one frame has none: it is a picture to be generated.
    """

    lengths: tuple[int, ...]  # tokens of each sample, over all ranks
    local: Tensor  # (m,) which of this rank's visual tokens they are
    index: Tensor  # (m,) position of each of those among the first frames' tokens of all samples
    rows: Rows  # like the visual stream's, in two parts for each sample: its first frame, and the rest


@dataclass(frozen=True, eq=False)
class Layout:
    """One packed microbatch on one rank. Made by `build_layout`, cached, never changed."""

    grids: tuple[Grid, ...]
    visual: Stream
    text: Stream
    first: FirstFrames
    token_counts: tuple[int, ...]  # visual + text tokens on each context-parallel rank
    groups: tuple[AttentionGroup, ...]  # of the packed attention; empty when the batched form applies
    queries: Order | None  # of the packed attention's rows
    keys: Order | None
    positions: Tensor  # (T_visual, 3) int64: frame, row, column of each local visual token

    @property
    def samples(self) -> int:
        return len(self.grids)

    @property
    def batched(self) -> bool:
        return not self.groups

    def sample_sum(self, x: Tensor) -> Tensor:
        """(T_visual, ...) -> (n,): sum over this rank's elements of each sample."""
        rows = x.flatten(1).sum(1)
        if self.visual.uniform:
            return rows.view(self.samples, -1).sum(1)
        return rows.new_zeros(self.samples).index_add(0, self.visual.sample, rows)

    def expand(self, values: Tensor) -> Tensor:
        """(n,) per-sample numbers -> (T_visual, 1), one row for each local visual token."""
        return values.index_select(0, self.visual.sample).unsqueeze(1)

    def sample_numel(self, width: int, without_first: bool = False) -> Tensor:
        """(n,) number of elements of each whole sample whose tokens are `width` wide;
        `without_first`: of what is not its first frame.
        """
        left_out = self.first.lengths if without_first else (0,) * self.samples
        return torch.tensor(
            [(n - out) * width for n, out in zip(self.visual.lengths, left_out, strict=True)],
            device=self.positions.device,
        )


def chunk(length: int, parts: int, part: int) -> tuple[int, int]:
    """Half-open range of `length` tokens that belongs to `part`; chunks differ by at most one token."""
    return length * part // parts, length * (part + 1) // parts


@lru_cache(maxsize=16)  # an iteration needs a few, and most iterations need the same
def build_layout(grids: tuple[Grid, ...], text_lengths: tuple[int, ...], mesh: Mesh) -> Layout:
    """Layout of a microbatch with one grid and one caption length per sample.

    Raises:
        ValueError: no samples, a count mismatch, or a sample with fewer tokens than
            context-parallel ranks.
    """
    if not grids or len(grids) != len(text_lengths):
        raise ValueError(
            f"{len(grids)} grids and {len(text_lengths)} captions: a microbatch needs one of each per "
            "sample, and at least one sample"
        )
    visual_lengths = tuple(f * h * w for f, h, w in grids)
    for length in visual_lengths:
        if length < mesh.cp.size:
            raise ValueError(
                f"a sample of {length} visual tokens does not split over parallel.cp={mesh.cp.size}; use "
                "larger samples or a smaller cp"
            )
    visual = _stream(visual_lengths, mesh)
    text = _stream(text_lengths, mesh)
    groups, queries, keys = (), None, None
    if mesh.cp.size > 1 or not (visual.uniform and text.uniform):
        groups, queries, keys = _attention_groups(visual_lengths, text_lengths, mesh)
    counts = tuple(
        sum(
            stop - start
            for lengths in (visual_lengths, text_lengths)
            for start, stop in (chunk(n, mesh.cp.size, r) for n in lengths)
        )
        for r in range(mesh.cp.size)
    )
    cells = [torch.cartesian_prod(*(torch.arange(size) for size in grid)) for grid in grids]
    positions = torch.cat(cells).to(mesh.device).index_select(0, visual.index)
    return Layout(
        grids, visual, text, _first_frames(grids, visual, mesh), counts, groups, queries, keys, positions
    )


def _stream(lengths: tuple[int, ...], mesh: Mesh) -> Stream:
    n, tp = len(lengths), mesh.tp.size if mesh.sequence_parallel else 1
    ranges = [chunk(length, mesh.cp.size, mesh.cp.rank) for length in lengths]
    counts = tuple(stop - start for start, stop in ranges)
    starts = list(accumulate(lengths, initial=0))
    index = torch.cat([torch.arange(starts[i] + a, starts[i] + b) for i, (a, b) in enumerate(ranges)])
    sample = torch.repeat_interleave(torch.arange(n), torch.tensor(counts))
    # The uniform form splits over tensor-parallel ranks by whole samples. Every rank must
    # choose the same form, hence lengths, not counts.
    uniform = (
        len(set(lengths)) == 1
        and lengths[0] % mesh.cp.size == 0
        and n % tp == 0
        and n // tp * counts[0] % mesh.row_multiple == 0
    )
    padding = 0 if uniform else -len(index) % (tp * mesh.row_multiple)
    rows = _rows(counts, uniform, padding, mesh.tp.rank if tp > 1 else 0, tp, mesh.device)
    whole = Rows(
        tuple(accumulate(counts, initial=0)), mesh.device, None if uniform else sample.to(mesh.device)
    )
    return Stream(
        lengths, counts, index.to(mesh.device), sample.to(mesh.device), uniform, padding, rows, whole
    )


def _rows(
    counts: tuple[int, ...], uniform: bool, padding: int, part: int, parts: int, device: torch.device
) -> Rows:
    """Rows of one of the `parts` that sequence parallelism makes of the folded form's first dimension."""
    filled = (*counts[:-1], counts[-1] + padding)
    cut = _cut(filled, part, parts)
    if uniform and parts == 1:
        return Rows(cut, device)
    sample = torch.repeat_interleave(torch.arange(len(counts)), 1 if uniform else torch.tensor(filled))
    return Rows(cut, device, sample.chunk(parts)[part].to(device))


def _cut(lengths: tuple[int, ...], part: int, parts: int) -> tuple[int, ...]:
    """Offsets, in one of equal parts of all rows, of runs of these lengths."""
    offsets = list(accumulate(lengths, initial=0))
    size = offsets[-1] // parts
    return tuple(min(max(offset - part * size, 0), size) for offset in offsets)


def _first_frames(grids: tuple[Grid, ...], visual: Stream, mesh: Mesh) -> FirstFrames:
    lengths = tuple(rows * columns if frames > 1 else 0 for frames, rows, columns in grids)
    ranges = [chunk(length, mesh.cp.size, mesh.cp.rank) for length in visual.lengths]
    # Tokens are in the order of frames, so a rank's part of a first frame is the
    # beginning of its chunk of the sample, or nothing.
    parts = [
        (start, max(min(stop, first) - start, 0))
        for (start, stop), first in zip(ranges, lengths, strict=True)
    ]
    ours, theirs = list(accumulate(visual.counts, initial=0)), list(accumulate(lengths, initial=0))
    local = torch.cat([torch.arange(ours[i], ours[i] + count) for i, (_, count) in enumerate(parts)])
    index = torch.cat(
        [torch.arange(theirs[i] + start, theirs[i] + start + count) for i, (start, count) in enumerate(parts)]
    )

    runs = [
        run for (_, first), count in zip(parts, visual.counts, strict=True) for run in (first, count - first)
    ]
    runs[-1] += visual.padding
    part, tp = (mesh.tp.rank, mesh.tp.size) if mesh.sequence_parallel else (0, 1)
    owner = (
        torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(runs)).chunk(tp)[part].to(mesh.device)
    )
    rows = Rows(
        _cut(tuple(runs), part, tp),
        mesh.device,
        owner.unflatten(0, (-1, visual.counts[0])) if visual.uniform else owner,
    )
    return FirstFrames(lengths, local.to(mesh.device), index.to(mesh.device), rows)


def _attention_groups(
    visual: tuple[int, ...], text: tuple[int, ...], mesh: Mesh
) -> tuple[tuple[AttentionGroup, ...], Order, Order]:
    """Rows of each sample in the rank-major array [text | visual] of rank 0, then of rank
    1, ...; queries stay local under all_gather.
    """
    rows = _gathered_rows(visual, text, mesh.cp.size)
    everything = range(mesh.cp.size)
    query_ranks = everything if mesh.context_parallel == "ulysses" else (mesh.cp.rank,)
    base = rows["base"][query_ranks[0]]
    by_length: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for i in range(len(visual)):
        query = torch.cat([rows[i, r] for r in query_ranks]) - base
        key = torch.cat([rows[i, r] for r in everything])
        by_length.setdefault((len(query), len(key)), []).append((query, key))
    members = [pair for same in by_length.values() for pair in same]
    groups = tuple(AttentionGroup(len(same), lq, lk) for (lq, lk), same in by_length.items())
    queries = Order.of([query for query, _ in members], mesh.device)
    keys = Order.of([key for _, key in members], mesh.device)
    return groups, queries, keys


def _gathered_rows(visual: tuple[int, ...], text: tuple[int, ...], ranks: int) -> dict:
    rows: dict[Any, Any] = {"base": []}
    offset = 0
    for r in range(ranks):
        rows["base"].append(offset)
        parts: list[list[Tensor]] = [[] for _ in visual]
        for lengths in (text, visual):
            for i, length in enumerate(lengths):
                start, stop = chunk(length, ranks, r)
                parts[i].append(torch.arange(offset, offset + stop - start))
                offset += stop - start
        rows.update({(i, r): torch.cat(part) for i, part in enumerate(parts)})
    return rows
