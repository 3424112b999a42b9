"""Which data a position counts in: equal for the same samples in the same order, wherever the shards lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from cosmos_fast.data.index import Index
from cosmos_fast.data.order import Window


def data_identity(indexes: Sequence[Index], windows: Iterable[Window | None] = ()) -> str:
    """`N samples, <12 hex digits>`, from names and sample counts of the shards and what is in quarantine.

    windows: those of the sources that come in window order; lanes and pieces take part. Neither folders nor times do,
    so shards that were copied elsewhere are the same data, unless that changes their order.
    """
    digest = hashlib.sha256()
    for index in indexes:
        counts = np.bincount(index.tables.sample_shard, minlength=len(index.shards)).tolist()
        shards = zip((shard.name for shard in index.shards), counts, strict=True)
        digest.update(repr((list(shards), index.rows_left_out().tolist())).encode())
    for window in windows:
        if window is not None:
            digest.update(window.lanes.to_bytes(8, "little") + window.starts.tobytes())
    return f"{sum(map(len, indexes)):,} samples, {digest.hexdigest()[:12]}"
