"""The quarantine: samples in it are none, everywhere; it is believed for the shards it was made of only."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest

from cosmos_fast.config import DataConfig, SourceConfig, ViewsConfig
from cosmos_fast.data import faults, index_file, quarantine
from cosmos_fast.data.index import Index, open_source
from cosmos_fast.data.index_summary import summarize
from cosmos_fast.data.loader import build_loader
from cosmos_fast.data.quarantine import BadSample, Part, Rules
from cosmos_fast.utils.errors import UserError
from tests.shards import picture, record, sample, write_shards, write_tar

RULES = Rules("auto", 1000, 1000)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("COSMOS_CACHE_DIR", str(folder))
    return folder


def opened(folder: Path, whole: bool = False) -> Index:
    return open_source(SourceConfig(path=str(folder)), whole=whole)


def put(folder: Path, bad: dict[int, list[int]]) -> Path:
    """Into quarantine: shard -> numbers of its samples."""
    index = opened(folder, whole=True)
    stamps = index_file.stamp(index.shards)
    edges = quarantine.shard_edges(index.tables, len(index.shards))
    parts = [
        Part(
            shard,
            stamps[shard],
            0,
            edges[shard + 1] - edges[shard],
            [BadSample(n, index.key(edges[shard] + n), faults.BROKEN_IMAGE, "cut") for n in numbers],
        )
        for shard, numbers in bad.items()
    ]
    path = quarantine.place(index.shards)
    quarantine.write(path, RULES, parts)
    return path


@pytest.mark.parametrize(
    "bad", [{}, {0: [0]}, {0: [4]}, {1: [0]}, {2: [3]}, {0: [0, 1, 4], 1: [0], 2: [0, 2, 3]}, {0: [0, 1, 2, 3, 4]}]
)
def test_the_others_keep_their_order_and_their_bytes(tmp_path: Path, bad: dict[int, list[int]]) -> None:
    folder = write_shards(tmp_path, (5, 1, 4))
    put(folder, bad)
    gone = {(0, 5, 6)[shard] + number for shard, numbers in bad.items() for number in numbers}
    expected = [number for number in range(10) if number not in gone]
    index = opened(folder)
    assert len(index) == len(expected)
    for i, number in enumerate(expected):
        assert index.key(i) == f"{number:06d}"
        assert index.name(i) == f"0000{0 if number < 5 else 1 if number < 6 else 2}.tar:{number:06d}"
        assert index.read(i) == {"jpg": picture(number), "json": record(number)}
    copy = pickle.loads(pickle.dumps(index))
    assert [copy.key(i) for i in range(len(copy))] == [f"{number:06d}" for number in expected]
    assert len(opened(folder, whole=True)) == 10
    assert summarize(index).samples == 10


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_is_every_usable_sample_once(tmp_path: Path, workers: int) -> None:
    folder = write_shards(tmp_path, (5, 1, 4))
    put(folder, {0: [1, 4], 2: [2]})
    config = DataConfig(
        train=(SourceConfig(path=str(folder)),), workers=workers, views=ViewsConfig(local_crops=0, local_captions=0)
    )
    loader = build_loader(config, image_size=8, context_length=8, seed=0, batch_size=7)
    try:
        assert loader.samples_per_epoch == 7
        stream = iter(loader)
        epochs = [next(stream).keys for _ in range(3)]
    finally:
        loader.close()
    usable = [f"{number:06d}" for number in (0, 2, 3, 5, 6, 7, 9)]
    assert [sorted(keys) for keys in epochs] == [usable] * 3
    assert loader.stats == {}


def test_a_shard_that_changed_keeps_all_its_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_shards(tmp_path, (5, 1, 4))
    put(folder, {0: [1], 2: [2, 3]})
    stat = (folder / "00002.tar").stat()
    os.utime(folder / "00002.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with caplog.at_level(logging.WARNING):
        assert len(opened(folder)) == 9
    assert "1 shards changed since they were verified" in caplog.text
    write_tar(folder / "00000.tar", {**sample(0), **sample(1)})
    assert len(opened(folder)) == 7


def test_it_is_told_how_many_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_shards(tmp_path, (5, 1, 4))
    put(folder, {0: [1], 2: [2, 3]})
    with caplog.at_level(logging.INFO, logger="cosmos_fast"):
        opened(folder)
    assert "3 samples in quarantine are left out (3 x broken or truncated image)" in caplog.text


def test_all_in_quarantine_is_a_user_error(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, (2,))
    path = put(folder, {0: [0, 1]})
    with pytest.raises(UserError, match="all 2 samples are in quarantine") as error:
        opened(folder)
    assert str(path) in str(error.value)


def test_two_folders_with_shards_of_one_name(tmp_path: Path) -> None:
    """A glob over folders: the second one's bad samples are the second one's."""
    write_shards(tmp_path / "a", (3,))
    write_shards(tmp_path / "b", (3,), first=10)
    index = open_source(SourceConfig(path=str(tmp_path / "*/*.tar")), whole=True)
    stamps = index_file.stamp(index.shards)
    bad = [BadSample(1, "000011", faults.BAD_JSON, "")]
    path = quarantine.place(index.shards)
    quarantine.write(path, RULES, [Part(0, stamps[0], 0, 3, []), Part(1, stamps[1], 0, 3, bad)])
    left = open_source(SourceConfig(path=str(tmp_path / "*/*.tar")))
    assert [left.key(i) for i in range(5)] == ["000000", "000001", "000002", "000010", "000012"]


def line(**changes: object) -> bytes:
    row = {"shard": 0, "stamp": ["00000.tar", 1, 1], "start": 0, "stop": 5, "bad": [[1, "k", "c", "d"]]}
    return json.dumps({**row, **changes}).encode() + b"\n"


HEAD = quarantine.head_line(RULES)
DAMAGED = {
    "empty": b"",
    "no json": b"\x80\x04pickle\n",
    "another program's": b'{"format": "other/1"}\n',
    "head of another shape": b'{"format": "cosmos-fast-quarantine/1", "x": 1}\n',
    "a list": b"[]\n",
    "line cut": HEAD + line()[:-9],
    "no number": HEAD + line(start="0"),
    "outside its part": HEAD + line(bad=[[5, "k", "c", "d"]]),
    "negative": HEAD + line(shard=-1),
    "no text": HEAD + line(bad=[[1, 2, 3, 4]]),
    "too short": HEAD + line(bad=[[1]]),
    "null": HEAD + line(bad=None),
    "true": HEAD + line(shard=False),
    "nested": HEAD + b'{"shard":' + b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_not_used(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_shards(tmp_path, (5,))
    path = put(folder, {0: [1]})
    path.write_bytes(DAMAGED[name])
    with caplog.at_level(logging.WARNING):
        assert len(opened(folder)) == 5
    assert "unreadable" in caplog.text
    with pytest.raises(ValueError):  # noqa: PT011 - whatever it says
        quarantine.read(path)


@pytest.mark.parametrize("changes", [{"shard": 7}, {"stop": 6}, {"stamp": []}, {"stamp": ["00000.tar", 1, 1]}])
def test_a_line_about_another_shard_says_nothing(tmp_path: Path, changes: dict[str, object]) -> None:
    folder = write_shards(tmp_path, (5,))
    path = put(folder, {0: [1]})
    stamp = index_file.stamp([folder / "00000.tar"])[0]
    path.write_bytes(HEAD + line(**{"stamp": stamp, **changes}))
    assert len(opened(folder)) == 5
    path.write_bytes(HEAD + line(stamp=stamp))
    assert len(opened(folder)) == 4


def test_it_lies_in_the_cache_where_the_folder_is_not_writable(tmp_path: Path, cache_folder: Path) -> None:
    folder = write_shards(tmp_path, (5,))
    (folder / index_file.FOLDER).write_text("in the way")
    path = put(folder, {0: [1]})
    assert cache_folder in path.parents
    assert len(opened(folder)) == 4


def test_it_holds_by_every_name_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(tmp_path / "shards", (5, 1, 4))
    put(folder, {0: [1], 2: [2]})
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    (tmp_path / "links").mkdir()
    for shard in sorted(folder.glob("*.tar")):
        (tmp_path / "links" / shard.name).symlink_to(shard)
    monkeypatch.chdir(folder)
    for name in (tmp_path / "link", tmp_path / "links", Path("../shards"), tmp_path / "links/../shards", Path()):
        assert len(opened(name)) == 8, name
    moved = folder.rename(tmp_path / "moved")
    assert len(opened(moved)) == 8


def test_it_holds_for_every_choice_of_the_shards(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", (5, 1, 4))
    put(folder, {0: [1], 2: [2]})
    assert [opened(folder / "00002.tar").key(i) for i in range(3)] == ["000006", "000007", "000009"]
    assert len(opened(folder / "{00002,00000}.tar")) == 7
    write_tar(folder / "000005.tar", sample(20))  # sorted between the others
    assert len(opened(folder)) == 9
    assert "000001" not in [opened(folder).key(i) for i in range(9)]


def test_of_two_files_about_a_shard_the_newer_one_counts(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", (5, 1, 4))
    every = put(folder, {0: [1], 2: [2]})
    alone = put(folder / "00000.tar", {0: [0, 3, 4]})
    for newer, left in ((1, 6), (-1, 8)):
        times = every.stat().st_mtime_ns
        os.utime(alone, ns=(times + newer * 10**9,) * 2)
        assert len(opened(folder)) == left


def test_files_of_other_sources_in_the_cache_say_nothing(tmp_path: Path, cache_folder: Path) -> None:
    """Shards of one name, size and time, as images of disks have them: the keys tell them apart."""
    for name, first in (("a", 0), ("b", 10)):
        folder = write_shards(tmp_path / name, (5,), first=first)
        (folder / index_file.FOLDER).write_text("in the way")
        os.utime(folder / "00000.tar", ns=(0, 0))
    assert (tmp_path / "a/00000.tar").stat().st_size == (tmp_path / "b/00000.tar").stat().st_size
    assert put(tmp_path / "a", {0: [1]}).is_relative_to(cache_folder)
    assert len(opened(tmp_path / "b")) == 5
    assert len(open_source(SourceConfig(path=str(tmp_path / "{a,b}/*.tar")))) == 10, "which of the two is not said"


def test_a_changed_shard_in_a_copied_folder_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_shards(tmp_path / "shards", (5, 1))
    put(folder, {0: [1]})
    copy = shutil.copytree(folder, tmp_path / "copy")
    os.utime(copy / "00000.tar", ns=(1, 1))
    with caplog.at_level(logging.WARNING):
        assert len(opened(copy)) == 6
    assert "1 shards changed since they were verified" in caplog.text
