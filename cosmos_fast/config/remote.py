"""How shards are read over a network."""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_fast.config.checks import require, require_not_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """Shards behind URLs, read in pieces and kept in a bounded cache on the local disk.

    cache_dir: where its folder goes; None is $COSMOS_CACHE_DIR or ~/.cache/cosmos-fast. cache_gib: its cap, GiB,
    for all processes of the machine together; 0 keeps nothing. piece_mib: what one read fetches of a shard, MiB.
    retry_s: how long a read that fails is tried again, seconds. timeout_s: how long a server may stay silent, seconds.
    threads: pieces fetched ahead at a time, a loader process.
    """

    cache_dir: str | None = None
    cache_gib: float = 32.0
    piece_mib: float = 4.0
    retry_s: float = 120.0
    timeout_s: float = 30.0
    threads: int = 8

    def __post_init__(self) -> None:
        require_not_negative("data.remote", self, "cache_gib", "retry_s")
        require_positive("data.remote", self, "piece_mib", "timeout_s", "threads")
        require(self.cache_dir != "", "data.remote.cache_dir is empty: name a folder, or null for the default")
