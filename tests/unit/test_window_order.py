"""Window order: whole epochs, few pieces open, every piece read once, batches mixed from many."""

from __future__ import annotations

import pickle
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cosmos_fast.config import DataConfig, RemoteConfig, SourceConfig, ViewsConfig
from cosmos_fast.data.batch import Batch
from cosmos_fast.data.index import open_source
from cosmos_fast.data.loader import Loader, build_loader
from cosmos_fast.data.mixture import open_mixture
from cosmos_fast.data.order import SampleOrder, Window
from cosmos_fast.data.pieces import sample_starts
from cosmos_fast.data.storage import Storage
from cosmos_fast.utils.errors import UserError
from tests.shards import write_shards, write_tar
from tests.web import Web, serve

VIEWS = ViewsConfig(global_crops=1, local_crops=1, global_captions=1, local_captions=1, local_image_size=8)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("COSMOS_CACHE_DIR", str(folder))
    return folder


def ragged_starts(pieces: int, seed: int = 0, most: int = 40) -> np.ndarray:
    sizes = np.random.default_rng(seed).integers(1, most + 1, pieces)
    return np.concatenate([[0], np.cumsum(sizes)])


def epoch_of(window: Window, epoch: int = 0, seed: int = 7) -> list[int]:
    return [window(offset, seed, epoch, 0) for offset in range(window.size)]


@pytest.mark.parametrize("pieces", [1, 2, 7, 100])
@pytest.mark.parametrize("lanes", [1, 2, 3, 16, 256])
def test_an_epoch_sees_every_sample_once(pieces: int, lanes: int) -> None:
    window = Window(ragged_starts(pieces, most=9), lanes)
    for epoch in range(2):
        assert sorted(epoch_of(window, epoch)) == list(range(window.size))


def test_orders_differ_by_seed_epoch_and_source_and_are_pure() -> None:
    window, again = (Window(ragged_starts(30), 8) for _ in range(2))
    names = [(seed, epoch, source) for seed in (0, 1) for epoch in (0, 1) for source in (0, 1)]
    orders = [tuple(window(offset, *name) for offset in range(window.size)) for name in names]
    assert len(set(orders)) == len(names)
    for name, order in reversed(list(zip(names, orders, strict=True))):
        assert tuple(again(offset, *name) for offset in reversed(range(window.size))) == order[::-1]
    copy = pickle.loads(pickle.dumps(window))
    assert [copy(offset, 1, 1, 1) for offset in range(window.size)] == list(orders[-1])


def test_few_pieces_are_open_and_none_is_opened_twice() -> None:
    starts, lanes = ragged_starts(400), 16
    window = Window(starts, lanes)
    piece_of = np.repeat(np.arange(400), np.diff(starts))
    order = piece_of[epoch_of(window)]
    first = {int(piece): at for at, piece in reversed(list(enumerate(order)))}
    last = {int(piece): at for at, piece in enumerate(order)}
    open_now = np.zeros(len(order) + 1, dtype=int)
    for piece in first:
        open_now[first[piece]] += 1
        open_now[last[piece] + 1] -= 1
    # A piece cut by the end of a lane is open at both ends of the epoch.
    assert np.cumsum(open_now).max() <= 2 * lanes
    whole = [piece for piece in first if last[piece] - first[piece] <= lanes * 40]
    assert len(whole) >= 400 - lanes


def test_batches_mix_as_many_pieces_as_there_are_lanes() -> None:
    starts, lanes = ragged_starts(600), 32
    window = Window(starts, lanes)
    piece_of = np.repeat(np.arange(600), np.diff(starts))
    order = piece_of[epoch_of(window)]
    batches = order[: len(order) // lanes * lanes].reshape(-1, lanes)
    assert min(len(set(batch.tolist())) for batch in batches) >= lanes - 3
    again = piece_of[epoch_of(window, 1)]
    pairs = [
        {frozenset(pair) for batch in rows for pair in zip(batch[:-1].tolist(), batch[1:].tolist(), strict=True)}
        for rows in (batches, again[: batches.size].reshape(-1, lanes))
    ]
    assert len(pairs[0] & pairs[1]) < 0.03 * len(pairs[0])  # neighbours of one epoch are not those of the next


def test_new_pieces_begin_evenly_over_the_epoch() -> None:
    """No burst of reads: as many pieces begin in every tenth of an epoch, but for the first ones of all lanes."""
    starts, lanes = ragged_starts(1500), 32
    piece_of = np.repeat(np.arange(1500), np.diff(starts))
    order = piece_of[epoch_of(Window(starts, lanes))]
    begun: list[int] = []
    known: set[int] = set()
    for at, piece in enumerate(order.tolist()):
        if piece not in known:
            known.add(piece)
            begun.append(at)
    counts = np.histogram(begun, bins=10, range=(0, len(order)))[0]
    assert counts.min() > 0.8 * 150
    assert counts[1:].max() < 1.2 * 150


def test_ranks_that_divide_the_lanes_share_no_piece() -> None:
    starts, lanes, ranks = ragged_starts(500), 32, 4
    window = Window(starts, lanes)
    piece_of = np.repeat(np.arange(500), np.diff(starts))
    order = piece_of[epoch_of(window)]
    batch = lanes // ranks
    readers: dict[int, set[int]] = {}
    for at, piece in enumerate(order.tolist()):
        readers.setdefault(piece, set()).add(at % lanes // batch)
    assert sum(len(who) - 1 for who in readers.values()) < lanes  # only those that a lane's end cuts


def test_a_large_epoch_starts_at_once() -> None:
    starts = np.arange(0, 27_000_001, 100)
    tracemalloc.start()
    try:
        order = SampleOrder([27_000_000], [1.0], 3, [Window(starts, 256)])
        places = {order.locate(position).sample for position in range(13_000_000, 13_000_500)}
        assert tracemalloc.get_traced_memory()[1] < 10 * starts.nbytes  # tables of pieces, none of samples
    finally:
        tracemalloc.stop()
    assert len(places) == 500


def test_a_mixture_of_window_and_global_sources_keeps_weights_and_epochs() -> None:
    starts = ragged_starts(6)
    size = int(starts[-1])
    order = SampleOrder([size, 40], [1.0, 2.0], 5, [Window(starts, 4), None])
    for epoch in range(2):
        span = range(epoch * (size + 80), (epoch + 1) * (size + 80))
        seen = Counter((place.source, place.sample) for place in map(order.locate, span))
        assert {seen[0, sample] for sample in range(size)} == {1}
        assert {seen[1, sample] for sample in range(40)} == {2}


def test_looking_ahead_meets_every_piece_before_it_is_wanted() -> None:
    starts, lanes = ragged_starts(300), 16
    order = SampleOrder([int(starts[-1])], [1.0], 0, [Window(starts, lanes)])
    piece_of = np.repeat(np.arange(300), np.diff(starts))
    asked: set[int] = set()
    late = 0
    for position in range(order.sizes[0] - lanes * 40):
        piece = int(piece_of[order.locate(position).sample])
        late += piece not in asked and position > lanes * 40
        asked.add(piece)
        asked.add(int(piece_of[order.locate(order.ahead(position)).sample]))
    assert late == 0
    assert SampleOrder([10], [1.0], 0).ahead(3) == 3


def test_pieces_cut_shards_by_bytes_and_leave_out_what_is_left_out(tmp_path: Path) -> None:
    sizes = [300, 5000, 100, 100, 100, 20_000, 1, 1]
    members = {f"{shard}{i}.jpg": bytes(size) for shard in "ab" for i, size in enumerate(sizes)}
    write_tar(tmp_path / "0.tar", {name: data for name, data in members.items() if name < "b"})
    write_tar(tmp_path / "1.tar", {name: data for name, data in members.items() if name >= "b"})
    found = open_source(SourceConfig(path=str(tmp_path)), storage=Storage(RemoteConfig(piece_mib=8 / 1024)))
    pieces = found.pieces
    assert pieces.first_row[0] == 0
    assert pieces.first_row[-1] == 16
    assert 8 in pieces.first_row  # a piece lies in one shard
    assert len(pieces.start) == 6
    for row in range(16):
        (place,) = found.members(row).values()
        start, stop = pieces.span(row)
        assert start <= place.offset
        assert place.offset + place.size <= stop
    assert sample_starts(pieces, []).tolist() == pieces.first_row.tolist()
    gone = [0, *range(int(pieces.first_row[1]), int(pieces.first_row[2]))]
    starts = sample_starts(pieces, gone)
    assert starts[-1] == 16 - len(gone)
    assert len(starts) == len(pieces.first_row) - 1


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    write_shards(tmp_path / "www", (9, 1, 13))
    with serve(tmp_path / "www") as web:
        yield web


def loader_of(path: str, **changes: Any) -> Loader:
    names = ("workers", "order", "window_pieces", "remote", "allow_pipe")
    data = {name: changes.pop(name) for name in names if name in changes}
    config = DataConfig(train=(SourceConfig(path=path),), **{"workers": 0, "views": VIEWS, **data})
    return build_loader(config, **{"image_size": 16, "context_length": 12, "seed": 3, "batch_size": 4, **changes})


def take(loader: Loader, count: int) -> list[Batch]:
    try:
        return list(islice(iter(loader), count))
    finally:
        loader.close()


SMALL = RemoteConfig(piece_mib=4 / 1024, retry_s=3.0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_over_http_gives_what_the_same_order_gives_from_a_disk(web: Web, tmp_path: Path, workers: int) -> None:
    remote = loader_of(web.url + "/{00000..00002}.tar", remote=SMALL, window_pieces=3, workers=workers)
    assert remote.stream.order.windows[0] is not None
    local = loader_of(str(tmp_path / "www"), remote=SMALL, order="window", window_pieces=3)
    ours, theirs = take(remote, 12), take(local, 12)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.texts, b.texts)
        assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))
    keys = [key for batch in ours for key in batch.keys]
    assert sorted(keys[:23]) == sorted(keys[23:46]) == [f"{i:06d}" for i in range(23)]


def test_resume_in_window_order_on_another_number_of_ranks(tmp_path: Path) -> None:
    folder = str(write_shards(tmp_path, (9, 1, 13)))
    settings = {"order": "window", "window_pieces": 3, "remote": SMALL}
    whole = take(loader_of(folder, batch_size=8, **settings), 6)
    ranks = [
        take(loader_of(folder, batch_size=4, rank=rank, world_size=2, start_position=24, **settings), 3)
        for rank in (0, 1)
    ]
    assert [batch.keys for batch in whole[3:]] == [a.keys + b.keys for a, b in zip(*ranks, strict=True)]


def test_another_order_is_other_data(tmp_path: Path) -> None:
    folder = str(write_shards(tmp_path, (9, 1, 13)))
    changes = [{}, {"order": "window"}, {"order": "window", "window_pieces": 3}, {"order": "window", "remote": SMALL}]
    names = [loader_of(folder, **change).identity for change in changes]
    assert len(set(names)) == 4
    assert loader_of(folder, order="global").identity == names[0]


@pytest.mark.parametrize("status", [503, 403])
def test_an_outage_in_the_middle_ends_the_run_in_one_line(web: Web, status: int) -> None:
    quick = RemoteConfig(piece_mib=4 / 1024, retry_s=0.2)
    loader = loader_of(web.url + "/{00000..00002}.tar", remote=quick, window_pieces=1)
    stream = iter(loader)
    next(stream)
    web.fail, web.status = 10_000, status
    with pytest.raises(UserError, match=rf"out of reach.*{status}.*resume") as error:
        list(islice(stream, 1000))
    assert "\n" not in str(error.value)
    loader.close()


def test_a_cache_too_small_for_the_pieces_that_are_open_is_refused(web: Web) -> None:
    web.ranged = False  # so a piece is a shard
    with pytest.raises(UserError, match=r"data\.window_pieces=256 .*cache_gib"):
        loader_of(web.url + "/{00000..00002}.tar", remote=RemoteConfig(cache_gib=4.5e-5))
    assert len(take(loader_of(web.url + "/{00000..00002}.tar", remote=RemoteConfig(cache_gib=1.0)), 3)) == 3


def test_auto_is_global_on_disks_and_global_on_the_web_keeps_no_pieces(web: Web, tmp_path: Path) -> None:
    def order_of(path: str, **changes: Any) -> Any:
        return open_mixture(DataConfig(train=(SourceConfig(path=path),), **changes), 0)

    indexes, order = order_of(str(tmp_path / "www"))
    assert order.windows == [None]
    indexes, order = order_of(web.url + "/{00000..00002}.tar", order="global")
    assert order.windows == [None]
    assert not indexes[0].keeps_pieces
    _, same = order_of(str(tmp_path / "www"), order="global")
    assert [same.locate(p) for p in range(50)] == [order.locate(p) for p in range(50)]
