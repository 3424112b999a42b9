"""What an index holds, in numbers: for people before a run, and for reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from cosmos_fast.data import faults
from cosmos_fast.data.index import IMAGE_EXTENSIONS, RECORD_EXTENSION, Index


@dataclass(frozen=True)
class IndexSummary:
    """members: extension -> (count, total bytes). faults: cause -> count, incomplete samples included.

    All of the shards, samples in quarantine too.
    """

    shards: int
    samples: int
    members: dict[str, tuple[int, int]]
    faults: dict[str, int]


def summarize(index: Index) -> IndexSummary:
    """Count members, bytes, incomplete samples and the faults of the shards; reads no member."""
    tables = index.tables
    sizes = tables.member_size.astype(np.int64)
    members = {}
    for number, extension in enumerate(tables.extensions):
        mine = tables.member_extension == number
        members[extension] = (int(mine.sum()), int(sizes[mine].sum()))
    causes = Counter(fault.cause for fault in index.faults)
    samples = len(tables.sample_shard)
    causes[faults.MISSING_IMAGE] = samples - _samples_with(index, IMAGE_EXTENSIONS)
    causes[faults.MISSING_RECORD] = samples - _samples_with(index, (RECORD_EXTENSION,))
    return IndexSummary(len(index.shards), samples, members, {cause: n for cause, n in causes.items() if n})


def _samples_with(index: Index, extensions: tuple[str, ...]) -> int:
    """How many samples have a member with one of these extensions."""
    tables = index.tables
    numbers = [number for number, extension in enumerate(tables.extensions) if extension in extensions]
    wanted = np.isin(tables.member_extension, numbers)
    # every sample has a member, so no slice between two starts is empty
    return int((np.add.reduceat(wanted, tables.member_start[:-1], dtype=np.int64) > 0).sum())
