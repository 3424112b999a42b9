"""Shards behind URLs: the same samples as from the disk, on good servers and bad ones."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cosmos_fast.cli.data.index import command
from cosmos_fast.config import SourceConfig
from cosmos_fast.data import faults, index, storage
from cosmos_fast.data.faults import SampleFault
from cosmos_fast.data.index import Index, open_source
from cosmos_fast.utils.errors import UserError
from tests.hand_clock import HandClock
from tests.remote import SAMPLES, check, opened, patient
from tests.shards import picture, record, sample, write_shards, write_tar
from tests.web import Web, serve


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("COSMOS_CACHE_DIR", str(folder))
    monkeypatch.setattr(storage, "_FIRST_WAIT_S", 0.01)
    return folder


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    write_shards(tmp_path / "www", (5, 4))
    with serve(tmp_path / "www") as web:
        yield web


@pytest.mark.parametrize("ranged", [True, False])
@pytest.mark.parametrize("etag", [True, False])
def test_reads_what_the_disk_would_give(web: Web, ranged: bool, etag: bool) -> None:
    web.ranged, web.etag = ranged, etag
    check(opened(web.url + "/{00000..00001}.tar"))


@pytest.mark.parametrize("piece_mib", [1e-3, 4e-3, 1.0])
def test_a_piece_is_fetched_once_and_no_byte_twice(web: Web, piece_mib: float) -> None:
    found = opened(web.url + "/00000.tar", piece_mib=piece_mib)
    web.requests.clear()
    web.sent_bytes = 0
    for _ in range(2):
        for i in range(5):
            assert found.read(i) == {"jpg": picture(i), "json": record(i)}
    assert len(web.requests) == len(found.pieces.start) <= 5
    assert web.sent_bytes == found.storage.cache.used_bytes()
    assert all(wanted.startswith("bytes=") for _, wanted in web.requests)


def test_second_opening_scans_nothing_and_a_changed_shard_is_scanned(web: Web, tmp_path: Path) -> None:
    opened(web.url + "/{00000..00001}.tar")
    web.requests.clear()
    found = opened(web.url + "/{00000..00001}.tar")
    assert sorted(web.requests) == [("00000.tar", "bytes=0-0"), ("00001.tar", "bytes=0-0")]
    write_tar(tmp_path / "www" / "00000.tar", sample(77))
    again = opened(web.url + "/{00000..00001}.tar")
    assert again.key(0) == "000077"
    with pytest.raises(SampleFault) as fault:  # the index that was open before does not read the new shard
        found.read(0)
    assert fault.value.cause == faults.UNREADABLE_SHARD
    assert "changed" in fault.value.detail
    assert again.read(0) == {"jpg": picture(77), "json": record(77)}


def test_a_shard_of_the_same_size_is_known_by_its_tag(web: Web, tmp_path: Path) -> None:
    found = opened(web.url + "/00000.tar")
    shard = tmp_path / "www" / "00000.tar"
    before = shard.stat()
    shard.write_bytes(shard.read_bytes().replace(b"raw 0", b"RAW 0"))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    with pytest.raises(SampleFault, match="changed"):
        found.read(0)
    assert b"RAW 0" in opened(web.url + "/00000.tar").read(0)["json"]


def test_members_that_lie_apart_do_not_make_pieces_long(web: Web, tmp_path: Path) -> None:
    members = {f"{i}.{kind}": bytes([i]) * 700 for kind in ("jpg", "json") for i in range(40)}
    shard = write_tar(tmp_path / "www" / "apart.tar", members)
    found = opened(web.url + "/apart.tar", piece_mib=8e-3)
    web.sent_bytes = 0
    assert [found.read(i) for i in range(40)] == [
        {"jpg": bytes([i]) * 700, "json": bytes([i]) * 700} for i in range(40)
    ]
    assert web.sent_bytes < 1.5 * shard.stat().st_size


def test_indexing_reads_headers_and_skips_large_members(web: Web, tmp_path: Path) -> None:
    write_tar(tmp_path / "www" / "big.tar", {f"{i}.jpg": bytes(2 << 20) for i in range(4)})
    found = opened(web.url + "/big.tar")
    assert len(found) == 4
    assert web.sent_bytes < 1 << 20
    assert len(web.requests) <= 7


@pytest.mark.parametrize(
    ("trouble", "ranged"),
    [
        ({"fail": 4}, True),
        ({"cut": 4}, True),
        ({"cut": 4}, False),
        ({"fail": 1, "status": 429, "retry_after": "1"}, True),
    ],
)
def test_passing_trouble_is_waited_out(
    web: Web,
    trouble: dict[str, Any],
    ranged: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    web.ranged = ranged
    found = opened(web.url + "/{00000..00001}.tar", cache_gib=0.1)
    for name, value in trouble.items():
        setattr(web, name, value)
    found.storage.cache.folder = found.storage.cache.folder / "empty"  # what indexing has fetched is not here
    clock = HandClock(monkeypatch, storage)
    start_s = clock()
    with caplog.at_level(logging.WARNING):
        check(found)
    assert (web.fail, web.cut) == (0, 0)
    assert clock() - start_s >= float(web.retry_after or 0)
    assert "trying again" in caplog.text
    assert [path.suffix for path in found.storage.cache.folder.iterdir() if path.suffix == ".part"] == []


def test_a_cut_read_goes_on_where_it_broke(web: Web, tmp_path: Path) -> None:
    found = opened(web.url + "/00000.tar")
    web.requests.clear()
    web.cut = 1
    assert found.read(0) == {"jpg": picture(0), "json": record(0)}
    first, second = (wanted.removeprefix("bytes=").split("-") for _, wanted in web.requests)
    assert int(second[0]) == (int(first[0]) + int(first[1]) + 1) // 2
    assert second[1] == first[1]


def test_a_dead_server_is_a_fault_of_the_sample_and_soon_of_the_next(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(web.url + "/00000.tar", retry_s=600.0)
    web.fail = 10_000
    clock = HandClock(monkeypatch, storage)
    for tries, least_s, at_most_s in ((40, 585, 600), (1, 0, 0)):  # patience once; then one each until it answers again
        web.requests.clear()
        start_s = clock()
        with pytest.raises(SampleFault) as fault:
            found.read(0)
        assert least_s <= clock() - start_s <= at_most_s
        assert len(web.requests) >= tries
        assert tries > 1 or len(web.requests) == 1
        assert fault.value.cause == faults.UNREACHABLE_SHARD
        assert "503" in fault.value.detail
        assert "\n" not in fault.value.detail
    web.fail = 0
    assert found.read(0)["json"] == record(0)


def test_a_silent_server_is_given_up_after_the_timeout(web: Web) -> None:
    found = opened(web.url + "/00000.tar")
    found.storage = patient(timeout_s=0.2, retry_s=0.3)
    with web.hold(), pytest.raises(SampleFault, match="timed out"):
        found.read(0)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("{url}/{{00000..00004}}.tar", ["00002.tar", "missing", "404"]),
        ("{url}/*.tar", ["do not list", "braces"]),
        ("{url}/", ["do not list", "braces"]),
        ("{url}/{{00000..", ["braces"]),
        ("ftp2://host/a.tar", ["ftp2"]),
        ("http://127.0.0.1:9/a.tar", ["127.0.0.1", "refused"]),
    ],
)
def test_an_address_that_cannot_be_read_ends_in_one_clear_line(web: Web, path: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        opened(path.format(url=web.url), retry_s=0.1)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_redirects_are_followed_and_passwords_stay_out_of_messages(web: Web) -> None:
    check(opened(web.url + "/old/{00000..00001}.tar"))
    web.password = "Basic dXNlcjpzM2NyZXQ="
    host = web.url.removeprefix("http://")
    check(opened(f"http://user:s3cret@{host}/{{00000..00001}}.tar"))
    with pytest.raises(UserError, match="access denied") as error:
        opened(f"http://user:wr0ng@{host}/00000.tar?signature=abc")
    assert "wr0ng" not in str(error.value)
    assert "abc" not in str(error.value)


def test_without_a_cache_every_member_is_read_by_itself(web: Web, cache_folder: Path) -> None:
    found = opened(web.url + "/{00000..00001}.tar", cache_gib=0)
    web.requests.clear()
    check(found)
    assert len(web.requests) == 2 * SAMPLES
    assert not (cache_folder / "shards").exists()
    web.ranged = False
    with pytest.raises(UserError, match=r"as a whole.*cache_gib"):
        open_source(SourceConfig(path=web.url + "/00000.tar"), storage=patient(cache_gib=0), rebuild=True)


def test_a_cache_that_cannot_be_written_makes_reading_slow_not_impossible(
    web: Web, cache_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (cache_folder / "shards").write_text("a file in the way")
    with caplog.at_level(logging.WARNING):
        check(opened(web.url + "/{00000..00001}.tar"))
    assert len([line for line in caplog.messages if "reading is slow" in line]) == 1


def test_the_cache_leaves_other_files_of_its_folder_alone(web: Web, tmp_path: Path) -> None:
    mine = tmp_path / "data"
    mine.mkdir()
    (mine / "thesis.tex").write_bytes(bytes(9000))
    found = opened(web.url + "/{00000..00001}.tar", cache_dir=str(mine), cache_gib=8e-6, piece_mib=1e-3)
    check(found)
    assert found.storage.cache.used_bytes() < 9000
    assert (mine / "thesis.tex").exists()
    assert sum(path.is_dir() for path in mine.iterdir()) == 1


def _read_all(found: Index) -> bool:
    check(found)
    return True


def test_processes_share_the_cache(web: Web) -> None:
    web.delay_s = 0.1
    found = opened(web.url + "/{00000..00001}.tar")
    web.requests.clear()
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert all(pool.map(_read_all, [pickle.loads(pickle.dumps(found))] * 3))
    assert len(web.requests) == len(found.pieces.start)


def test_read_ahead_fetches_side_by_side_without_being_waited_for(web: Web) -> None:
    found = opened(web.url + "/{00000..00001}.tar", piece_mib=1e-3)
    web.requests.clear()
    with web.hold():
        for i in range(SAMPLES):
            found.fetch_ahead(i)
        deadline = time.monotonic() + 120
        while web.busy < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert web.busy >= 4
    check(found)
    assert len(web.requests) == len(found.pieces.start)
    copy = pickle.loads(pickle.dumps(found))
    copy.fetch_ahead(0)
    assert copy.read(0) == found.read(0)


def test_command_indexes_urls(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(command, [web.url + "/{00000..00001}.tar"], catch_exceptions=False)
    assert "9 samples in 2 shards" in result.output
    monkeypatch.setattr(index, "build_tables", lambda *_: pytest.fail("scanned again"))
    assert CliRunner().invoke(command, [web.url + "/{00000..00001}.tar"], catch_exceptions=False).exit_code == 0
    assert os.environ["COSMOS_CACHE_DIR"] in result.output.replace("\n", "")
