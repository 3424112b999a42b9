"""Exact position in window order, on disks and on the web: kill -9 in the middle of reads, and the order stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cosmos_fast.config import DataConfig, RemoteConfig, SourceConfig, ViewsConfig
from cosmos_fast.data.loader import Loader, build_loader
from cosmos_fast.data.storage import Storage
from tests.lives import Run, Split, killed_at_random
from tests.shards import sample, write_shards, write_tar
from tests.web import Web, serve

SAMPLES = 101
SHARDS = "{00000..00003}.tar"
VIEWS = ViewsConfig(global_crops=1, local_crops=1, global_captions=1, local_captions=1, local_image_size=8)
REMOTE = {
    # Of four samples, three of them open, in a cache that holds a third of the data: it evicts all the time.
    "pieces": RemoteConfig(piece_mib=16 / 1024, cache_gib=128 / 2**20, threads=2),
    # From a server without ranged reads.
    "shards": RemoteConfig(piece_mib=1.0, cache_gib=1.0, threads=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uneven shards; one of the samples is broken, so that substitutes are part of the order."""
    folder = write_shards(tmp_path_factory.mktemp("shards"), (60, 1, SAMPLES - 62))
    broken = sample(900)
    broken["000900.jpg"] = broken["000900.jpg"][:200]
    write_tar(folder / "00003.tar", broken)
    return folder


@pytest.fixture
def web(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server that takes a while for each answer, so that kills come in the middle of them."""
    monkeypatch.setenv("COSMOS_CACHE_DIR", str(tmp_path / "cache"))
    with serve(folder) as web:
        web.delay_s = 0.002
        yield web


class Make:
    """Makes the loader of one rank over a folder or URL."""

    def __init__(self, path: str, kind: str) -> None:
        self.config = DataConfig(
            train=(SourceConfig(path=path),),
            views=VIEWS,
            order="window",
            window_pieces=3,
            remote=REMOTE[kind],
            loader="pil",
        )

    def __call__(self, split: Split, rank: int, start: int) -> Loader:
        return build_loader(
            replace(self.config, workers=split.workers),
            image_size=16,
            context_length=16,
            seed=5,
            batch_size=split.batch_size,
            rank=rank,
            world_size=split.ranks,
            start_position=start,
        )


@pytest.fixture(scope="module", params=REMOTE)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(kind: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    """Three epochs from the disk without a kill, on one rank without workers."""
    run = Run(tmp_path_factory.mktemp("whole"), Make(str(folder), kind))
    run.live(Split(1, 0, 16), stop=3 * SAMPLES)
    return run.history()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_kill_9_on_a_disk(seed: int, kind: str, folder: Path, whole: list[tuple[str, int]], tmp_path: Path) -> None:
    history = killed_at_random(Run(tmp_path, Make(str(folder), kind)), seed, SAMPLES + 20)
    assert history == whole[: len(history)]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_kill_9_while_pieces_are_fetched(
    seed: int, kind: str, web: Web, whole: list[tuple[str, int]], tmp_path: Path
) -> None:
    """What a killed process has left in the cache is believed by none of those after it, and the cap holds."""
    web.ranged = kind == "pieces"
    make = Make(f"{web.url}/{SHARDS}", kind)
    history = killed_at_random(Run(tmp_path, make), seed, SAMPLES + 20)
    cache = Storage.of(make.config).cache
    assert 0 < cache.used_bytes() <= cache.cap_bytes
    assert history == whole[: len(history)]
