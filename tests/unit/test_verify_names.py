"""`data verify` of shards by another name, in other company, with strange names, and of a folder that changes."""

from __future__ import annotations

import os
import pickle
import tarfile
from pathlib import Path

import pytest

from cosmos_fast.cli.main import command, run
from cosmos_fast.config import SourceConfig
from cosmos_fast.data import verify as verification
from cosmos_fast.data import verify_pool
from cosmos_fast.data.index import Index, open_source
from cosmos_fast.data.quarantine import Rules
from cosmos_fast.data.verify import Verdict, verify
from cosmos_fast.data.verify_part import Task
from cosmos_fast.utils.errors import UserError
from tests.shards import picture, record, sample, write_shards, write_tar

RULES = Rules("auto", 50_000_000, 1 << 20)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("COSMOS_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "PART_SAMPLES", 3)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Shards of 8, 1 and 6 samples; 000002, 000007, 000008 and 000014 are bad."""
    folder = write_shards(tmp_path / "shards", (8, 1, 6))
    for shard, (first, count, bad) in enumerate([(0, 8, (2, 7)), (8, 1, (8,)), (9, 6, (14,))]):
        members: dict[str, bytes] = {}
        for number in range(first, first + count):
            members.update(sample(number))
            if number in bad:
                members[f"{number:06d}.jpg"] = b"no image"
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


BAD = ["000002", "000007", "000008", "000014"]


def whole(folder: Path) -> Index:
    return open_source(SourceConfig(path=str(folder)), whole=True)


def verified(folder: Path, workers: int = 1, **options: object) -> Verdict:
    return verify(whole(folder), RULES, workers, **options)  # type: ignore[arg-type]


def keys(verdict: Verdict) -> list[str]:
    return [bad.key for _, bad in verdict.bad]


def test_a_shard_more_and_another_name_of_the_folder_are_no_reason_to_read_all(shards: Path) -> None:
    verified(shards)
    write_tar(shards / "00003.tar", {**sample(30), "000031.jpg": b"no image", "000031.json": record(31)})
    more = verified(shards)
    assert (more.read, keys(more)) == (2, [*BAD, "000031"])
    assert verified(shards / "00002.tar").read == 0
    moved = shards.rename(shards.with_name("moved"))
    assert (verified(moved).read, keys(verified(moved))) == (0, [*BAD, "000031"])


@pytest.mark.usefixtures("small_parts")
def test_a_stopped_verification_goes_on_with_a_shard_more(shards: Path) -> None:
    done: list[int] = []

    def stop(samples: int) -> None:
        done.append(samples)
        if len(done) == 2:
            raise InterruptedError

    with pytest.raises(UserError):
        verified(shards, progress=stop)
    write_tar(shards / "000005.tar", sample(30))
    rest = verified(shards)
    assert (rest.read, keys(rest)) == (16 - sum(done), BAD)


def test_what_was_verified_together_is_known_of_each_folder(shards: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "a_second_one", (3,), first=50)
    write_tar(other / "00000.tar", {**sample(50), "000051.jpg": b"no image", "000051.json": record(51)})
    both = verify(whole(tmp_path / "*/*.tar"), RULES, 1)
    assert (both.read, len(both.bad)) == (17, 5)
    for folder, left in ((shards, 11), (other, 1)):
        assert verified(folder).read == 0
        assert len(open_source(SourceConfig(path=str(folder)))) == left


@pytest.mark.parametrize("line", [["verify", "--workers=1"], ["index"]])
def test_names_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: list[str]) -> None:
    """No key is an emoji, no range of letters in a path a colour."""
    for shard in ("a.tar", "b.tar"):
        write_tar(tmp_path / shard, {**sample(0), "x:cat:.:100:": b"", "x:cat:.jpg": b"no", "x:cat:.json": record(1)})
        with tarfile.open(tmp_path / shard, "a") as archive:
            archive.addfile(tarfile.TarInfo("x:cat:.jpg"))
    source = f"{tmp_path}/[a-b].tar"
    assert run(command, ["data", *line, source]) == (2 if "verify" in line else 0)
    out = capsys.readouterr().out
    assert f"{source}: " in out
    assert "a.tar:x:cat:" in out
    assert "verify" in line or ":100:" in out  # an extension


@pytest.mark.usefixtures("small_parts")
def test_a_shard_that_changes_meanwhile_is_not_verified(shards: Path) -> None:
    shard = shards / "00000.tar"

    def change(_: int) -> None:
        data = shard.read_bytes()
        shard.write_bytes(data.replace(picture(1), bytes(len(picture(1)))))  # of a part that is read by now
        os.utime(shard, ns=(0, 10**18))

    with pytest.raises(UserError, match=r"00000\.tar has changed while it was verified; run the command again"):
        verified(shards, progress=change)
    verdict = verified(shards)
    assert keys(verdict) == ["000001", *BAD]
    assert verdict.read == 15, "the changed shard is read from its beginning"


@pytest.mark.parametrize("is_cached", [True, False])
def test_workers_read_by_the_index_of_their_parent(shards: Path, is_cached: bool) -> None:
    index = whole(shards)
    assert index.cache is not None
    if not is_cached:
        index.cache.unlink()
        index.cache = None
    write_tar(shards / "00000a.tar", {**sample(90), **sample(91)})  # comes between the shards of the index
    write_tar(shards / "00002.tar", sample(9))
    setup = pickle.loads(pickle.dumps(verify_pool.Setup.of(index, RULES, verify_pool.find_bad)))
    copy = setup.open()
    assert [copy.name(i) for i in range(len(copy))] == [index.name(i) for i in range(15)]
    tasks = [Task(0, 0, 0, 8), Task(1, 8, 0, 1)]
    assert [bad.key for task in tasks for bad in setup.reader(copy, RULES, task)] == BAD[:3]


def test_workers_refuse_an_index_of_other_versions(shards: Path) -> None:
    index = whole(shards)
    setup = verify_pool.Setup.of(index, RULES, verify_pool.find_bad)
    write_tar(shards / "00002.tar", sample(9))
    assert whole(shards).cache == index.cache, "another process indexes the shards as they are now"
    with pytest.raises(UserError, match="shards have changed while they were verified"):
        setup.open()
