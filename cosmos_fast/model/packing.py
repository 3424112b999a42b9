"""Packed sequences: one [total_tokens, D] matrix for the linear layers, groups of equal length for attention.

A batch of sequences of different lengths is laid out group after group; the sequences of a group have one length, so
attention runs densely on each group and nothing is spent on padding. Rounding a causal sequence up to its group's
length is exact: later positions are invisible to earlier ones.

Axes: N sequences, L tokens, T packed tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

GROUP_COST_TOKENS = 128  # what one more attention call costs, in tokens of padding; measured on a 2-core CPU


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
        pooled_rows: [N] packed row of each sequence's pooled token, in packed order of the sequences.
        kept_rows: rows the last block must produce: all rows of `keep_all` groups, pooled rows of the others.
        pooled_in_kept: [N] position of each pooled row within `kept_rows`.
    """

    groups: tuple[SequenceGroup, ...]
    causal: bool
    pooled_rows: Tensor = field(repr=False)
    kept_rows: Tensor = field(repr=False)
    pooled_in_kept: Tensor = field(repr=False)

    @classmethod
    def build(cls, groups: Sequence[SequenceGroup], *, causal: bool, device: torch.device) -> PackedLayout:
        pooled_rows: list[Tensor] = []
        kept_rows: list[Tensor] = []
        pooled_in_kept: list[Tensor] = []
        start = kept = 0
        for group in groups:
            starts = torch.arange(group.count) * group.length
            pooled = starts + torch.tensor(group.pooled)
            pooled_rows.append(start + pooled)
            if group.keep_all:
                kept_rows.append(start + torch.arange(group.tokens))
                pooled_in_kept.append(kept + pooled)
            else:
                kept_rows.append(start + pooled)
                pooled_in_kept.append(kept + torch.arange(group.count))
            start += group.tokens
            kept += len(kept_rows[-1])
        rows = (torch.cat(parts).to(device) for parts in (pooled_rows, kept_rows, pooled_in_kept))
        return cls(tuple(groups), causal, *rows)

    @property
    def token_counts(self) -> list[int]:
        """Tokens of each group: the split of the packed matrix."""
        return [group.tokens for group in self.groups]

    @property
    def kept_counts(self) -> list[int]:
        """Rows of each group among `kept_rows`."""
        return [group.tokens if group.keep_all else group.count for group in self.groups]


@dataclass(frozen=True)
class PackedText:
    """Captions without the padding after EOT.

    Attributes:
        layout: the packed layout.
        token_ids: [T] ids in packed order.
        positions: [T] position of each token in its caption.
        order: [N] original caption of each packed sequence.
    """

    layout: PackedLayout
    token_ids: Tensor
    positions: Tensor
    order: Tensor


def pack_text(token_ids_NL: Tensor, keep_all: int = 0) -> PackedText:
    """Trim captions after EOT and lay them out in groups.

    Args:
        token_ids_NL: [N, L] ids; EOT is the largest id of a caption (the first of them).
        keep_all: the first so many captions keep all L tokens, padding included, and all outputs of them are read.

    Returns:
        The packed captions.
    """
    device = token_ids_NL.device
    context = token_ids_NL.shape[1]
    eot_N = token_ids_NL.argmax(dim=1).tolist()
    groups: list[SequenceGroup] = []
    order: list[int] = []
    if keep_all:
        groups.append(SequenceGroup(keep_all, context, tuple(eot_N[:keep_all]), keep_all=True))
        order.extend(range(keep_all))
    by_length = sorted(range(keep_all, len(eot_N)), key=eot_N.__getitem__)
    for members in _group_by_length([eot_N[i] + 1 for i in by_length]):
        chosen = by_length[members]
        groups.append(
            SequenceGroup(len(chosen), eot_N[chosen[-1]] + 1, tuple(eot_N[i] for i in chosen), keep_all=False)
        )
        order.extend(chosen)
    layout = PackedLayout.build(groups, causal=True, device=device)
    order_N = torch.tensor(order, device=device)
    members_N = order_N.split([group.count for group in groups])
    ids = [token_ids_NL[rows, : group.length].flatten() for rows, group in zip(members_N, groups, strict=True)]
    positions = [torch.arange(group.length, device=device).repeat(group.count) for group in groups]
    return PackedText(layout, torch.cat(ids), torch.cat(positions), order_N)


def _group_by_length(lengths: list[int]) -> list[slice]:
    """Split ascending lengths into runs that share their longest length, at the least padding plus call cost."""
    members = Counter(lengths)
    distinct = tuple(sorted(members))
    counts = tuple(members[length] for length in distinct)
    ends = _cheapest_runs(distinct, counts)
    slices, start, first = [], 0, 0
    for end in ends:
        size = sum(counts[first:end])
        slices.append(slice(start, start + size))
        start, first = start + size, end
    return slices


@lru_cache(maxsize=1024)
def _cheapest_runs(distinct: tuple[int, ...], counts: tuple[int, ...]) -> tuple[int, ...]:
    """Ends (exclusive, into `distinct`) of the cheapest partition into runs; dynamic programming over prefixes."""
    best: list[float] = [0.0]
    cut: list[int] = [0]
    for end in range(1, len(distinct) + 1):
        padding, members, cheapest, where = 0, 0, float("inf"), end - 1
        for start in range(end - 1, -1, -1):
            members += counts[start]
            padding += counts[start] * (distinct[end - 1] - distinct[start])
            cost = best[start] + padding + GROUP_COST_TOKENS
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
