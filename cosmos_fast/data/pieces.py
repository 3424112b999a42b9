"""Pieces: runs of consecutive samples that lie together in a shard, so that one read fetches them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cosmos_fast.data.index_file import IndexTables

_BLOCK = 512


@dataclass(frozen=True)
class Pieces:
    """first_row [P+1]: rows of the index where each piece begins, and the end. start, stop [P]: its bytes in the shard.

    Shards written in the usual way hold the members of a sample side by side, and these lie in the sample's piece;
    others may lie outside and are read by themselves.
    """

    first_row: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def span(self, row: int) -> tuple[int, int]:
        """Bytes of the piece that a row of the index belongs to."""
        piece = int(np.searchsorted(self.first_row, row, side="right")) - 1
        return int(self.start[piece]), int(self.stop[piece])

    def mean_bytes(self) -> float:
        """Of a piece."""
        return float((self.stop - self.start).mean())


def cut(tables: IndexTables, piece_bytes: int, whole_shards: Sequence[int] = ()) -> Pieces:
    """Cut every shard where a sample begins in the next `piece_bytes`; whole_shards: those that stay in one piece."""
    shard = tables.sample_shard.astype(np.int64)
    row_start = tables.member_block[tables.member_start[:-1]].astype(np.int64) * _BLOCK  # a sample has a member
    grid = row_start // piece_bytes
    if whole_shards:
        grid[np.isin(shard, whole_shards)] = 0
    begins = np.ones(len(shard), dtype=bool)
    begins[1:] = (shard[1:] != shard[:-1]) | (grid[1:] != grid[:-1])
    first_row = np.concatenate([np.flatnonzero(begins), [len(shard)]])
    member_end = tables.member_block.astype(np.int64) * _BLOCK + tables.member_size
    start = row_start[first_row[:-1]]
    stop = np.maximum.reduceat(member_end, tables.member_start[first_row[:-1]])
    is_followed = shard[first_row[1:-1]] == shard[first_row[:-2]]
    following = np.where(is_followed, start[1:], np.iinfo(np.int64).max)
    stop[:-1] = np.minimum(stop[:-1], np.maximum(following, start[:-1] + 1))
    return Pieces(first_row, start, stop)


def sample_starts(pieces: Pieces, left_out: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where each piece begins in the numbering of samples, and the end; rows that are left out are no samples."""
    gone = np.searchsorted(np.asarray(left_out, dtype=np.int64), pieces.first_row)
    return np.unique(pieces.first_row - gone)
