"""The sources of a run, opened, and the order in which their samples come."""

from __future__ import annotations

from cosmos_fast.config import DataConfig
from cosmos_fast.data.index import Index, open_source
from cosmos_fast.data.order import SampleOrder, Window
from cosmos_fast.data.sources import source_named
from cosmos_fast.data.storage import Storage
from cosmos_fast.utils.errors import UserError

_GIB = 1 << 30
_READ_AHEAD_SHARE = 1.5  # half of the pieces that are open have a successor waiting


def open_mixture(config: DataConfig, seed: int) -> tuple[list[Index], SampleOrder]:
    """(indexes, one a source; their order). UserError: see open_source() and sample_order()."""
    storage = Storage.of(config)
    with source_named("data.train"):
        indexes = [open_source(source, storage=storage) for source in config.train]
    return indexes, sample_order(config, indexes, seed)


def sample_order(config: DataConfig, indexes: list[Index], seed: int) -> SampleOrder:
    """The order of a run over the sources `config.train`, opened as `indexes`.

    Remote indexes are told whether neighbours of a sample are wanted soon. UserError: a cache too small for the order.
    """
    windows = [_window(index, config) for index in indexes]
    for index, window in zip(indexes, windows, strict=True):
        index.keeps_pieces = index.keeps_pieces and window is not None
    _check_cache(config, [index for index, window in zip(indexes, windows, strict=True) if window is not None])
    return SampleOrder([len(index) for index in indexes], [source.weight for source in config.train], seed, windows)


def _window(index: Index, config: DataConfig) -> Window | None:
    order = config.order if config.order != "auto" else "window" if index.is_remote else "global"
    return Window(index.piece_starts(), config.window_pieces) if order == "window" else None


def _check_cache(config: DataConfig, indexes: list[Index]) -> None:
    """The pieces that are open at a time must fit the cache, or each would be fetched again for every sample of it."""
    remote = [index for index in indexes if index.is_remote]
    if not remote or not config.remote.cache_gib:
        return
    needed = sum(
        index.pieces.mean_bytes() * min(config.window_pieces * _READ_AHEAD_SHARE, len(index.pieces.start))
        for index in remote
    )
    if needed > config.remote.cache_gib * _GIB:
        raise UserError(
            f"data.window_pieces={config.window_pieces} pieces of remote shards, and those read ahead, take "
            f"{needed / _GIB:.3g} GiB, more than data.remote.cache_gib={config.remote.cache_gib:g}: raise it, or lower "
            "data.window_pieces (a shard on a server without ranged reads, or of a pipe:, is one piece)"
        )
