"""Memory of a rank, its loader workers included, is bounded: by what is prefetched, not by how long the run is."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_fast.config import DaliConfig, DataConfig, SourceConfig, ViewsConfig
from cosmos_fast.data.loader import Loader, build_loader
from cosmos_fast.data.sample import RawBatch, SampleStream
from tests.lives import children
from tests.loaders import needs_dali
from tests.shards import sample, write_shards, write_tar

SAMPLES = 10_000  # after the warm-up
WARM_UP = 6_000  # a process and its forks settle: each page of before the fork is copied when it is first written to
BATCH = 50
LOOK_EVERY = 500
# Little work a sample: what is kept of one is asked here, not what it takes to make one.
VIEWS = ViewsConfig(
    global_crops=1,
    local_crops=0,
    global_captions=1,
    local_captions=0,
    jitter_p=0.0,
    gray_p=0.0,
    global_blur_p=(0.0,),
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 samples, ten of them broken: faults are bounded too."""
    folder = write_shards(tmp_path_factory.mktemp("shards"), (300, 190))
    broken: dict[str, bytes] = {}
    for number in range(900, 910):
        broken |= sample(number)
        broken[f"{number:06d}.json"] = b"{" * number
    write_tar(folder / "00002.tar", broken)
    return folder


@contextmanager
def opened(shards: Path, **changes: Any) -> Iterator[Loader]:
    sources = (SourceConfig(path=str(shards)),)
    config = DataConfig(train=sources, views=VIEWS, dali=DaliConfig(threads=1), **changes)
    loader = build_loader(config, image_size=32, context_length=77, seed=0, batch_size=BATCH)
    try:
        yield loader
    finally:
        loader.close()


def private_bytes(pid: int) -> int:
    """Memory that this process alone has written to. What it has only read of libraries counts nowhere: whether others
    have it mapped too changes with what else runs on the machine."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(size) for size in re.findall(r"^Private_Dirty:\s+(\d+) kB", text, re.MULTILINE))


def return_freed_memory() -> None:
    """Have the C library give what is freed back to the system at once: without it the heap swings by 20 MiB."""
    library = ctypes.CDLL(None)
    for parameter, value in ((_M_MMAP_THRESHOLD, 1 << 16), (_M_TRIM_THRESHOLD, 1 << 17), (_M_ARENA_MAX, 1)):
        assert library.mallopt(parameter, value) == 1


def measure(shards: Path, changes: dict[str, Any], answer: Connection) -> None:
    """In a process of its own: bytes of it and its workers after the warm-up, and then every LOOK_EVERY samples."""
    multiprocessing.set_start_method("fork", force=True)  # as in a run; a spawned process would spawn its workers too
    torch.set_num_threads(1)
    return_freed_memory()
    gc.collect()
    gc.freeze()  # or a late collection in a worker writes to pages that are its parent's, and gets copies of them
    pid = multiprocessing.current_process().pid or 0
    held = []
    with opened(shards, **changes) as loader:
        stream = iter(loader)
        for position in range(WARM_UP, WARM_UP + SAMPLES + 1, LOOK_EVERY):
            for batch in islice(stream, (position - loader.position) // BATCH):
                last = batch.next_position
            assert last == position
            held.append(sum(private_bytes(each) for each in (pid, *children(pid))))
    answer.send(held)


@pytest.mark.long
@pytest.mark.parametrize("workers", [2, 0])
@pytest.mark.parametrize("kind", ["pil", pytest.param("dali", marks=needs_dali)])
def test_memory_does_not_grow_over_10000_samples(shards: Path, kind: str, workers: int) -> None:
    """By the least that was held at any look in the first and in the last quarter: batches come and go between.

    Three times if need be: what is kept of samples grows every time, a page that a worker copies once does not.
    """
    found: list[list[int]] = []
    while len(found) < 3 and not any(map(is_bounded, found)):
        found.append(looks(shards, {"loader": kind, "workers": workers}))
    assert is_bounded(found[-1]), found


def looks(shards: Path, changes: dict[str, Any]) -> list[int]:
    """measure() in a fresh process: a fork would turn pages of this one into its own, one by one."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(shards, changes, there))
    process.start()
    there.close()
    held: list[int] = here.recv()
    process.join()
    return held


def is_bounded(held: list[int]) -> bool:
    quarter = len(held) // 4
    return min(held[-quarter:]) - min(held[:quarter]) < 7_500 * 256  # tokens that are kept take 616 bytes a sample


class Counting(SampleStream):
    """Counts the batches that workers have made."""

    made: Any

    def __getitems__(self, positions: Any) -> RawBatch:
        with self.made.get_lock():
            self.made.value += 1
        return super().__getitems__(positions)


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 1), (2, 3)])
def test_workers_make_no_more_than_the_prefetch_ahead(shards: Path, workers: int, prefetch: int) -> None:
    with opened(shards, loader="pil", workers=workers, prefetch=prefetch) as loader:
        loader.stream.__class__ = Counting
        made = loader.stream.made = multiprocessing.Value("i", 0)  # type: ignore[attr-defined]
        stream = iter(loader)
        for handed_out in (1, 2, 3):
            next(stream)
            most, deadline = handed_out + workers * prefetch, time.monotonic() + 120
            while made.value < most and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)  # in which workers that did not wait would make more
            assert made.value == most
