"""The loader's processes: threads, signals, deaths, what is left open. What it loads: test_loader_contract.py."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_fast.config import DataConfig
from cosmos_fast.data.loader import build_loader
from cosmos_fast.data.sample import RawBatch, SampleStream
from cosmos_fast.utils.errors import UserError
from tests.loaders import Opener, kill_workers_at_the_next_batch, same, take
from tests.shards import write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), (9, 1, 13))


@pytest.fixture
def opened(shards: Path) -> Iterator[Opener]:
    opener = Opener("pil", shards)
    yield opener
    opener.close()


def test_to_moves_the_images_and_leaves_captions_on_the_host(opened: Opener) -> None:
    batch = take(opened(), 1)[0].to("meta")
    assert {image.device.type for image in batch.images} == {"meta"}
    assert batch.texts.device.type == "cpu"
    assert batch.position == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_recolouring_after_the_workers_gives_the_same_batches(opened: Opener, workers: int) -> None:
    later = opened(workers=workers)
    later.stream.recolor = False  # what a GPU run does: the numbers travel with the crops
    for ours, theirs in zip(take(later, 3), take(opened(), 3), strict=True):
        assert same(ours, theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recolouring_on_the_gpu_gives_the_same_views(opened: Opener) -> None:
    for ours, theirs in zip(take(opened(device="cuda", workers=1), 3), take(opened(), 3), strict=True):
        assert ours.keys == theirs.keys
        assert all(image.is_cuda for image in ours.images)
        for x, y in zip(ours.images, theirs.images, strict=True):
            assert ((x.cpu() - y).abs() > 0.02).float().mean() < 0.01


class ThreadReport(SampleStream):
    """Hands out the thread settings of the process it runs in, as keys."""

    def __getitems__(self, positions: Any) -> RawBatch:
        settings = [str(torch.get_num_threads()), os.environ.get("OMP_NUM_THREADS", "")]
        return super().__getitems__(positions)._replace(keys=settings)


def test_workers_use_one_thread(opened: Opener) -> None:
    loader = opened(workers=1)
    loader.stream.__class__ = ThreadReport
    torch.set_num_threads(2)
    try:
        assert take(loader, 1)[0].keys == ["1", "1"]
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("error", [ConnectionResetError(), EOFError(), FileNotFoundError()])
@pytest.mark.parametrize("killed", [True, False])
def test_a_connection_that_breaks_is_a_worker_that_died_only_if_one_did(
    opened: Opener, error: Exception, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it is killed while it hands over a batch; else it is the shards' own error, raised in a worker."""
    loader = opened(workers=1)
    next(iter(loader))
    if killed:
        (worker,) = loader._batches._workers
        with contextlib.suppress(RuntimeError):  # of torch's handler of SIGCHLD, at any moment from here on
            worker.kill()
            worker.join()

    def broken(_: object) -> None:
        raise error

    monkeypatch.setattr(type(loader._batches), "__next__", broken)
    with pytest.raises(UserError if killed else type(error), match="worker died" if killed else None):
        next(iter(loader))


def test_killed_worker_ends_in_one_clear_line_not_in_a_hang(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = opened(workers=2)
    stream = iter(loader)
    next(stream)
    kill_workers_at_the_next_batch(loader, monkeypatch)
    with pytest.raises(UserError, match="worker died"):
        list(islice(stream, 100))


def test_workers_leave_signals_to_the_trainer_and_end_with_it(opened: Opener) -> None:
    loader = opened(workers=1)
    stream = iter(loader)
    next(stream)
    workers = multiprocessing.active_children()
    assert workers
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid or 0, number)
    assert len([next(stream) for _ in range(6)]) == 6
    loader.close()
    for worker in workers:
        worker.join(timeout=120)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("end", ["pass", "raise RuntimeError"])
def test_a_script_that_leaves_its_loader_open_still_ends(shards: Path, end: str) -> None:
    script = f"""
import builtins
from cosmos_fast.config import DataConfig, SourceConfig
from cosmos_fast.data.loader import build_loader
config = DataConfig(train=(SourceConfig(path={str(shards)!r}),), workers=2)
loader = build_loader(config, image_size=16, context_length=8, seed=0, batch_size=2)
stream = iter(loader)
next(stream)
builtins.kept = [loader, stream]  # the garbage collector comes too late
{end}
"""
    result = subprocess.run([sys.executable, "-c", script], timeout=600, capture_output=True, text=True, check=False)
    assert result.returncode == ("Runtime" in end), result.stderr


def test_no_source_is_a_user_error(opened: Opener) -> None:
    with pytest.raises(UserError, match=r"data\.train is empty"):
        build_loader(DataConfig(), image_size=20, context_length=24, seed=0, batch_size=2)


def test_stream_survives_pickling_for_spawned_workers(opened: Opener) -> None:
    stream = opened().stream
    ours, theirs = pickle.loads(pickle.dumps(stream))[5], stream[5]
    assert ours.keys == theirs.keys
    assert torch.equal(ours.stacks[0].pixels, theirs.stacks[0].pixels)
