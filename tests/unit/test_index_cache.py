"""The cached index: when it is believed, when it is built again, and where it lies."""

from __future__ import annotations

import json
import os
import pickle
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from cosmos_fast.config import SourceConfig
from cosmos_fast.data import index, index_build, index_file
from cosmos_fast.data.index import Index, open_source
from tests.shards import picture, record, sample, write_shards, write_tar


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("COSMOS_CACHE_DIR", str(folder))
    return folder


def opened(path: Path | str) -> Index:
    return open_source(SourceConfig(path=str(path)))


def test_second_opening_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(write_shards(tmp_path, (3, 2)))
    assert first.cache is not None
    assert first.cache.parent == tmp_path / index_file.FOLDER
    monkeypatch.setattr(index, "build_tables", lambda *_: pytest.fail("scanned again"))
    again = opened(tmp_path)
    assert [again.read(i) for i in range(5)] == [first.read(i) for i in range(5)]
    assert [again.key(i) for i in range(5)] == [first.key(i) for i in range(5)]


def test_the_file_of_ordinary_paths_keeps_its_name() -> None:
    """Or every cache would be built again."""
    shards = [Path("/nowhere/ü/00000.tar"), Path("/nowhere/ü/00001.tar")]
    beside, _ = index_file.places(shards)
    assert beside == Path("/nowhere/ü/.cosmos_index/fc4ad8ece0b7df557a32ff88.idx")


def test_faults_survive_the_cache(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, (4,)) / "00000.tar"
    os.truncate(shard, shard.stat().st_size - 11_000)
    first, again = opened(tmp_path), opened(tmp_path)
    assert again.faults == first.faults != []


def test_changed_shard_is_scanned_again(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, (3,)) / "00000.tar"
    assert len(opened(tmp_path)) == 3
    write_tar(shard, {**sample(7), **sample(8)})
    found = opened(tmp_path)
    assert [found.key(i) for i in range(len(found))] == ["000007", "000008"]
    before = shard.stat()
    data = shard.read_bytes().replace(b"000007.j", b"000009.j")
    header = bytearray(data)
    for offset in range(0, len(header), 512):  # mend the checksums of the renamed headers: same size, new time
        block = header[offset : offset + 512]
        if block.startswith(b"000009.j"):
            block[148:156] = b" " * 8
            header[offset + 148 : offset + 156] = f"{sum(block):06o}\0 ".encode()
    shard.write_bytes(header)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert opened(tmp_path).key(0) == "000009"


def test_a_shard_that_changes_while_it_is_indexed_is_scanned_again(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, (3, 2)) / "00000.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:3000])  # a copy under way, which ends after its scan

    def end_the_copy(done: int, total: int) -> None:
        if done == total:
            shard.write_bytes(data)

    first = open_source(SourceConfig(path=str(tmp_path)), on_shard=end_the_copy)
    assert len(first) < 5
    found = opened(tmp_path)
    assert (len(found), found.faults) == (5, [])


@pytest.mark.parametrize("damage", ["cut", "garbage", "old version", "out of range", "pickle", "deep", "endless"])
def test_damaged_cache_is_built_again(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = opened(write_shards(tmp_path, (3,))).cache
    assert cache is not None
    good = cache.read_bytes()
    if damage == "cut":
        cache.write_bytes(good[:-20])
    elif damage == "garbage":
        cache.write_bytes(b"\0" * len(good))
    elif damage == "old version":
        cache.write_bytes(good.replace(b'"version": 1', b'"version": 0'))
    elif damage == "out of range":
        columns = index_build.build_tables([tmp_path / "00000.tar"])
        columns.member_start[-1] = 1000
        shards = [tmp_path / "00000.tar"]
        index_file.save(shards, index_file.stamp(shards), columns)
    elif damage == "pickle":
        cache.write_bytes(pickle.dumps(print))
    else:
        head = b"[" * 100_000 if damage == "deep" else _endless_head(good)
        cache.write_bytes(good[:8] + len(head).to_bytes(8, "little") + head + good)
    found = opened(tmp_path)
    assert [found.read(i) for i in range(3)] == [{"jpg": picture(i), "json": record(i)} for i in range(3)]
    assert cache.read_bytes() == good


def _endless_head(good: bytes) -> bytes:
    head = json.loads(good[16 : 16 + int.from_bytes(good[8:16], "little")])
    return json.dumps({**head, "lengths": dict.fromkeys(head["lengths"], float("inf"))}).encode()


def test_cache_goes_elsewhere_where_the_folder_is_not_writable(tmp_path: Path, cache_folder: Path) -> None:
    write_shards(tmp_path, (3,))
    (tmp_path / index_file.FOLDER).write_text("a file in the way, as good as a read-only folder")
    found = opened(tmp_path)
    assert found.cache is not None
    assert cache_folder in found.cache.parents
    assert len(opened(tmp_path)) == 3


def test_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, (3,))

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        assert opened(tmp_path).cache is None
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".idx")]
    assert opened(tmp_path).cache is not None


def test_processes_that_start_together_scan_once(tmp_path: Path) -> None:
    write_shards(tmp_path, (3,))
    with ProcessPoolExecutor(3) as pool:
        assert sorted(pool.map(_open_and_report, [str(tmp_path)] * 3)) == [False, False, True]


def _open_and_report(path: str) -> bool:
    """Whether this process had to scan."""
    scanned = []
    open_source(SourceConfig(path=path), on_shard=lambda done, _: (scanned.append(done), time.sleep(0.5)))
    return bool(scanned)


def test_no_place_for_a_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, (3,))
    (tmp_path / index_file.FOLDER).write_text("")
    monkeypatch.setenv("COSMOS_CACHE_DIR", str(tmp_path / "00000.tar"))
    found = opened(tmp_path)
    assert found.cache is None
    assert len(found) == 3
