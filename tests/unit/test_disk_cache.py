"""The bounded cache of fetched files: whole files only, the cap at every moment, killed writers leave no harm."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from cosmos_fast.data.disk_cache import CacheFullError, DiskCache, Part

FORK = multiprocessing.get_context("fork")


def content(name: str, size: int = 1000) -> bytes:
    return random.Random(name).randbytes(size)


def get(cache: DiskCache, name: str, size: int = 1000, known: bool = True, made: list[str] | None = None) -> bytes:
    def fill(part: Part) -> None:
        if made is not None:
            made.append(name)
        data = content(name, size)
        for start in range(0, size, 300):
            part.write(data[start : start + 300])

    fd = cache.open(name, size if known else None, fill)
    try:
        return os.pread(fd, 2 * size, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("known", [True, False])
def test_makes_a_file_once_and_reads_it_again(tmp_path: Path, known: bool) -> None:
    cache, made = DiskCache(tmp_path / "deep" / "cache", 1 << 30), []
    for _ in range(3):
        assert get(cache, "a", known=known, made=made) == content("a")
    assert made == ["a"]
    assert cache.used_bytes() == 1000
    assert cache.holds("a")
    assert not cache.holds("b")


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 5000)
    for age, name in enumerate("abcde"):
        get(cache, name)
        os.utime(tmp_path / name, (1000.0 + age, 1000.0 + age))
    get(cache, "a")  # used again
    get(cache, "f")
    assert cache.used_bytes() <= 5000
    assert cache.holds("a")
    assert cache.holds("f")
    assert not cache.holds("b")


@pytest.mark.parametrize("known", [True, False])
def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path, known: bool) -> None:
    cache = DiskCache(tmp_path, 5000)
    get(cache, "small")
    with pytest.raises(CacheFullError):
        get(cache, "large", 6000, known)
    assert not list(tmp_path.glob("large*"))
    assert get(cache, "small", made=[]) == content("small")
    assert cache.used_bytes() <= 5000


def test_an_open_file_outlives_its_eviction(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 2000)
    fd = cache.open("a", 1000, lambda part: part.write(content("a")))
    get(cache, "b")
    get(cache, "c")
    assert not cache.holds("a")
    assert os.pread(fd, 1000, 0) == content("a")
    os.close(fd)


@pytest.mark.parametrize("error", [RuntimeError("network"), OSError(errno.ENOSPC, "full")])
def test_a_failed_fill_is_passed_on_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    cache = DiskCache(tmp_path, 5000)

    def fill(part: Part) -> None:
        part.write(b"half")
        raise error

    for _ in range(10):  # and its booking does not stay either: 10 x 1000 would pass the cap
        with pytest.raises(type(error)):
            cache.open("a", 1000, fill)
    assert cache.used_bytes() == 0
    assert get(cache, "a") == content("a")


@pytest.mark.parametrize("size", [999, 1001])
def test_a_file_of_the_wrong_size_is_not_believed(tmp_path: Path, size: int) -> None:
    cache, made = DiskCache(tmp_path, 1 << 20), []
    (tmp_path / "a").write_bytes(bytes(size))
    assert get(cache, "a", made=made) == content("a")
    assert made == ["a"]
    with pytest.raises(OSError, match="999 of 1000"):
        cache.open("b", 1000, lambda part: part.write(bytes(999)))
    assert not cache.holds("b")


def _hang(folder: Path, name: str) -> None:
    def fill(part: Part) -> None:
        part.write(b"x" * 700)
        (folder.parent / "hanging").touch()
        time.sleep(3600)  # until it is killed

    DiskCache(folder, 5000).open(name, 1000, fill)


def test_a_killed_writer_leaves_nothing_that_is_believed(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    for name in ("a", "b"):
        process = FORK.Process(target=_hang, args=(folder, name))
        process.start()
        while not (tmp_path / "hanging").exists():
            time.sleep(0.01)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        (tmp_path / "hanging").unlink()
    cache = DiskCache(folder, 5000)
    assert not cache.holds("a")
    assert get(cache, "a") == content("a")  # its unfinished file is taken over
    for name in "cdefg":
        get(cache, name)
    assert not list(folder.glob("*.part"))  # the other one is swept up by the first eviction
    assert cache.used_bytes() <= 5000


def test_waiting_readers_make_the_file_once(tmp_path: Path) -> None:
    cache, made, read = DiskCache(tmp_path, 1 << 20), [], []

    def fill(part: Part) -> None:
        made.append(1)
        time.sleep(0.1)
        part.write(content("a"))

    def reader() -> None:
        fd = cache.open("a", 1000, fill)
        read.append(os.pread(fd, 1000, 0))
        os.close(fd)

    threads = [threading.Thread(target=reader) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert read == [content("a")] * 8


CAP, FILES = 20_000, 60


def _churn(folder: Path, seed: int, stop: Path) -> None:
    cache, numbers = DiskCache(folder, CAP), random.Random(seed)
    while not stop.exists():
        name = str(numbers.randrange(FILES))
        size = 500 + 37 * int(name)
        assert get(cache, name, size, known=int(name) % 3 > 0) == content(name, size)


def test_processes_that_churn_and_die_keep_cap_and_content(tmp_path: Path) -> None:
    """Three processes read far more than fits, one of them is killed again and again; the cap holds all the time."""
    folder = tmp_path / "cache"
    folder.mkdir()
    patched = pytest.MonkeyPatch()
    patched.setattr("cosmos_fast.data.disk_cache._BOOKED_AHEAD", 400)
    stop = tmp_path / "stop"
    steady = [FORK.Process(target=_churn, args=(folder, seed, stop)) for seed in (1, 2)]
    for process in steady:
        process.start()
    cache, most = DiskCache(folder, CAP), 0
    while most <= CAP / 2:
        assert all(process.is_alive() for process in steady)
        most = max(most, cache.used_bytes())
    for seed in range(3, 15):
        victim = FORK.Process(target=_churn, args=(folder, seed, stop))
        victim.start()
        for _ in range(10):
            time.sleep(0.005)
            most = max(most, cache.used_bytes())
        victim.kill()
        victim.join()
    stop.touch()
    for process in steady:
        process.join()
    patched.undo()
    assert [process.exitcode for process in steady] == [0, 0]
    assert CAP / 2 < most <= CAP
    for path in folder.iterdir():
        if path.name.isdigit():
            assert path.read_bytes() == content(path.name, 500 + 37 * int(path.name))


def test_who_finds_no_room_waits_for_those_who_write(tmp_path: Path) -> None:
    cache, steps = DiskCache(tmp_path, 1500), []

    def fill(part: Part) -> None:
        steps.append("begin")
        time.sleep(0.1)
        part.write(content("a"))
        steps.append("end")

    threads = [threading.Thread(target=lambda name=name: os.close(cache.open(name, 1000, fill))) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steps == ["begin", "end"] * 3
    assert cache.used_bytes() <= 1500
