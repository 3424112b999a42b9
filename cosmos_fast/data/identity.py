"""Which data a position counts in: equal for the same samples in the same order, wherever the shards lie."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from cosmos_fast.data.index import Index


def data_identity(indexes: Sequence[Index]) -> str:
    """`N samples, <12 hex digits>`, from names and sample counts of the shards and what is in quarantine.

    Neither folders nor times take part, so shards that were copied elsewhere are the same data.
    """
    digest = hashlib.sha256()
    for index in indexes:
        counts = np.bincount(index.tables.sample_shard, minlength=len(index.shards)).tolist()
        shards = zip((shard.name for shard in index.shards), counts, strict=True)
        digest.update(repr((list(shards), index.rows_left_out().tolist())).encode())
    return f"{sum(map(len, indexes)):,} samples, {digest.hexdigest()[:12]}"
