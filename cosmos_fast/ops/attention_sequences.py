"""How packed sequences lie in the rows of queries and of keys.

Axes: N sequences, T packed queries, S packed keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from cosmos_fast.utils.transfer import move

Groups = tuple[tuple[int, int], ...]  # (count, length) of neighbours of one length, in packed order


@dataclass(frozen=True, eq=False)
class Sequences:
    """N sequences, their queries in packed rows one behind the other, and their keys likewise.

    Causal attention is aligned to the end: query i of n sees the first m - n + i + 1 of its m keys.

    Attributes:
        query_groups, key_groups: the sequences in groups of one length, on the host; both have the same counts.
        cu_queries, cu_keys: [N + 1] int32, rows where the sequences begin, and the end.
        max_queries, max_keys: the longest of each.
        visible_keys: for each group, how many of its keys the one query of each sequence sees ([count] int64), or None
            where it sees them all. Only where sequences were rounded up to the length of their group; such sequences
            are for the backend "sdpa".
    """

    query_groups: Groups
    key_groups: Groups
    cu_queries: Tensor = field(repr=False)
    cu_keys: Tensor = field(repr=False)
    max_queries: int
    max_keys: int
    visible_keys: tuple[Tensor | None, ...] = field(repr=False)

    @classmethod
    def from_groups(
        cls,
        query_groups: Sequence[tuple[int, int]],
        key_groups: Sequence[tuple[int, int]] | None = None,
        *,
        visible_keys: Sequence[Tensor | None] | None = None,
        device: torch.device | str = "cpu",
    ) -> Sequences:
        """Sequences in groups of (count, length); keys lie as queries do unless given.

        Raises:
            ValueError: a length below 1, or other counts of queries than of keys.
        """
        queries = tuple(query_groups)
        keys = queries if key_groups is None else tuple(key_groups)
        if [count for count, _ in queries] != [count for count, _ in keys]:
            raise ValueError(f"query_groups {queries} and key_groups {keys} have other counts, expected the same")
        for name, groups in (("query_groups", queries), ("key_groups", keys)):
            if any(length < 1 for _, length in groups):
                raise ValueError(f"{name} {groups} has a length below 1")
        cu_queries = _boundaries(queries)
        on_host = cls(
            query_groups=queries,
            key_groups=keys,
            cu_queries=cu_queries,
            cu_keys=cu_queries if keys == queries else _boundaries(keys),
            max_queries=max((length for _, length in queries), default=0),
            max_keys=max((length for _, length in keys), default=0),
            visible_keys=(None,) * len(queries) if visible_keys is None else tuple(visible_keys),
        )
        return move(on_host, torch.device(device))

    @classmethod
    def from_lengths(
        cls, queries: Sequence[int], keys: Sequence[int] | None = None, *, device: torch.device | str = "cpu"
    ) -> Sequences:
        """One length a sequence; keys as many as queries unless given."""
        keys = queries if keys is None else keys
        if len(queries) != len(keys):
            raise ValueError(f"lengths of {len(queries)} queries and of {len(keys)} keys, expected as many of both")
        pairs = list(zip(queries, keys, strict=True))
        runs = [(len(list(run)), *pair) for pair, run in groupby(pairs)]
        return cls.from_groups(
            [(count, length) for count, length, _ in runs],
            [(count, length) for count, _, length in runs],
            device=device,
        )

    def with_queries(
        self, query_groups: Sequence[tuple[int, int]], visible_keys: Sequence[Tensor | None] | None = None
    ) -> Sequences:
        """Other queries for the same keys."""
        others = Sequences.from_groups(query_groups, self.key_groups, visible_keys=visible_keys)
        return replace(others, cu_keys=self.cu_keys)

    @property
    def rounded(self) -> bool:
        """Whether some keys of a sequence are none of its own."""
        return any(visible is not None for visible in self.visible_keys)

    @cached_property
    def queries(self) -> int:
        """T, rows of queries."""
        return sum(count * length for count, length in self.query_groups)

    @cached_property
    def keys(self) -> int:
        """S, rows of keys."""
        return sum(count * length for count, length in self.key_groups)


def lengths(groups: Groups) -> list[int]:
    """The length of every sequence."""
    return [length for count, length in groups for _ in range(count)]


def _boundaries(groups: Groups) -> Tensor:
    counts, group_lengths = np.array(groups, dtype=np.int64).reshape(-1, 2).T
    rows = np.concatenate([[0], np.repeat(group_lengths, counts).cumsum()])
    return torch.from_numpy(rows.astype(np.int32))
