"""Packed sequences: one [total_tokens, D] matrix for the linear layers, attention within each sequence.

A batch of sequences of different lengths is laid out group after group; the sequences of a group have one length.
Where the attention backend takes any lengths, there is a group for every length and nothing is spent on padding. Where
it wants few groups, lengths are rounded up, at the least padding plus call cost. Rounding a causal sequence up to its
group's length is exact: later positions are invisible to earlier ones.

Layouts are computed on the host. Axes: N sequences, L tokens, T packed tokens, K kept rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cosmos_fast.ops.attention import Sequences, takes_any_length
from cosmos_fast.utils.transfer import move

GROUP_COST_TOKENS = 128  # what one more attention call costs, in tokens of padding; measured on a 2-core CPU
GPU_GROUP_COST_TOKENS = 1024  # the same on a GPU: some ten launches; an estimate, not measured


@dataclass(frozen=True)
class SequenceGroup:
    """`count` sequences of `length` tokens each, contiguous in the packed matrix.

    `pooled` lists, for every sequence, the position of its one token that the features are read from; `keep_all` says
    that its other outputs are read as well.
    """

    count: int
    length: int
    pooled: tuple[int, ...]
    keep_all: bool

    @property
    def tokens(self) -> int:
        return self.count * self.length


@dataclass(frozen=True)
class PackedLayout:
    """How sequences lie in a packed matrix, and which rows of it are read at the end of the tower.

    Attributes:
        groups: in packed order.
        causal: attention looks back only.
        backend: the attention that it was laid out for.
        sequences: every token a query.
        kept_sequences: queries of the kept rows only.
        kept_rows: [K] rows the last block must produce: all rows of `keep_all` groups, pooled rows of the others.
        pooled_in_kept: [N] where in `kept_rows` the pooled row of each sequence is, in the order they were given.
    """

    groups: tuple[SequenceGroup, ...]
    causal: bool
    backend: str
    sequences: Sequences
    kept_sequences: Sequences
    kept_rows: Tensor = field(repr=False)
    pooled_in_kept: Tensor = field(repr=False)

    @classmethod
    def build(
        cls,
        groups: Sequence[SequenceGroup],
        *,
        causal: bool,
        backend: str = "sdpa",
        order: Sequence[int] | None = None,
    ) -> PackedLayout:
        """A layout on the host.

        Args:
            groups: in packed order.
            causal, backend: see the class.
            order: for each packed sequence, which of the given ones it is; None: packed in the order given.
        """
        kept_rows: list[np.ndarray] = []
        pooled_in_kept: list[np.ndarray] = []
        visible: list[Tensor | None] = []
        start = kept = 0
        for group in groups:
            pooled_of_each = np.array(group.pooled, dtype=np.int64)
            pooled = np.arange(group.count) * group.length + pooled_of_each
            if group.keep_all:
                kept_rows.append(start + np.arange(group.tokens))
                pooled_in_kept.append(kept + pooled)
            else:
                kept_rows.append(start + pooled)
                pooled_in_kept.append(kept + np.arange(group.count))
            hides = causal and not group.keep_all and bool((pooled_of_each + 1 < group.length).any())
            visible.append(torch.from_numpy(pooled_of_each + 1) if hides else None)
            start += group.tokens
            kept += len(kept_rows[-1])
        pooled_N = np.concatenate(pooled_in_kept)
        if order is not None:
            given_N = np.empty_like(pooled_N)
            given_N[np.array(order)] = pooled_N
            pooled_N = given_N
        sequences = Sequences.from_groups([(group.count, group.length) for group in groups])
        queries = [(group.count, group.length if group.keep_all else 1) for group in groups]
        return cls(
            groups=tuple(groups),
            causal=causal,
            backend=backend,
            sequences=sequences,
            kept_sequences=sequences.with_queries(queries, visible),
            kept_rows=torch.from_numpy(np.concatenate(kept_rows)),
            pooled_in_kept=torch.from_numpy(pooled_N),
        )

    @property
    def token_counts(self) -> list[int]:
        """Tokens of each group: the split of the packed matrix."""
        return [group.tokens for group in self.groups]


@dataclass(frozen=True)
class PackedText:
    """Captions without the padding after EOT.

    Attributes:
        layout: the packed layout.
        token_ids: [T] ids in packed order.
        positions: [T] position of each token in its caption.
    """

    layout: PackedLayout
    token_ids: Tensor
    positions: Tensor


def pack_text(
    token_ids_NL: Tensor, keep_all: int = 0, *, backend: str = "sdpa", device: torch.device | None = None
) -> PackedText:
    """Trim captions after EOT and lay them out in groups.

    Args:
        token_ids_NL: [N, L] ids; EOT is the largest id of a caption (the first of them). Lengths are read on the host:
            ids that lie on a GPU are fetched, which waits for it.
        keep_all: the first so many captions keep all L tokens, padding included, and all outputs of them are read.
        backend: the attention that will run.
        device: where the result goes; None: where the ids are.

    Returns:
        The packed captions.
    """
    device = token_ids_NL.device if device is None else device
    token_ids_NL = token_ids_NL.cpu()
    context = token_ids_NL.shape[1]
    eot_N = token_ids_NL.argmax(dim=1).numpy()
    groups: list[SequenceGroup] = []
    if keep_all:
        groups.append(SequenceGroup(keep_all, context, tuple(eot_N[:keep_all].tolist()), keep_all=True))
    by_length = keep_all + np.argsort(eot_N[keep_all:], kind="stable")
    cost = GROUP_COST_TOKENS if device.type == "cpu" else GPU_GROUP_COST_TOKENS
    lengths = (eot_N[by_length] + 1).tolist()
    for members in _group_by_length(lengths, cost=0 if takes_any_length(backend) else cost):
        pooled = tuple(eot_N[by_length[members]].tolist())
        groups.append(SequenceGroup(len(pooled), pooled[-1] + 1, pooled, keep_all=False))
    order = np.concatenate([np.arange(keep_all), by_length])
    group_lengths = [group.length for group in groups]
    length_of_each = np.repeat(group_lengths, [group.count for group in groups])
    starts = np.cumsum(length_of_each) - length_of_each
    positions = np.arange(length_of_each.sum()) - np.repeat(starts, length_of_each)
    source = np.repeat(order * context, length_of_each) + positions
    layout = PackedLayout.build(groups, causal=True, backend=backend, order=order.tolist())
    ids = token_ids_NL.flatten()[torch.from_numpy(source)]
    return move(PackedText(layout, ids, torch.from_numpy(positions)), device)


def _group_by_length(lengths: list[int], cost: int) -> list[slice]:
    """Split ascending lengths into runs that share their longest length, at the least padding plus call cost."""
    members = Counter(lengths)
    distinct = tuple(sorted(members))
    counts = tuple(members[length] for length in distinct)
    ends = _cheapest_runs(distinct, counts, cost) if cost else range(1, len(distinct) + 1)
    slices, start, first = [], 0, 0
    for end in ends:
        size = sum(counts[first:end])
        slices.append(slice(start, start + size))
        start, first = start + size, end
    return slices


@lru_cache(maxsize=1024)
def _cheapest_runs(distinct: tuple[int, ...], counts: tuple[int, ...], group_cost: int) -> tuple[int, ...]:
    """Ends (exclusive, into `distinct`) of the cheapest partition into runs; dynamic programming over prefixes."""
    best: list[float] = [0.0]
    cut: list[int] = [0]
    for end in range(1, len(distinct) + 1):
        padding, members, cheapest, where = 0, 0, float("inf"), end - 1
        for start in range(end - 1, -1, -1):
            members += counts[start]
            padding += counts[start] * (distinct[end - 1] - distinct[start])
            cost = best[start] + padding + group_cost
            if cost < cheapest:
                cheapest, where = cost, start
            if padding > cheapest:
                break
        best.append(cheapest)
        cut.append(where)
    ends, end = [], len(distinct)
    while end:
        ends.append(end)
        end = cut[end]
    return tuple(reversed(ends))
