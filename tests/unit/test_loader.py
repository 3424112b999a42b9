"""The loader: the same samples for every split over ranks, workers and restarts."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_fast.config import DataConfig, SourceConfig, ViewsConfig
from cosmos_fast.data.batch import Batch
from cosmos_fast.data.loader import Loader, build_loader
from cosmos_fast.data.sample import RawBatch, SampleStream
from cosmos_fast.utils.errors import UserError
from tests.shards import sample, write_shards, write_tar

SAMPLES = 23
VIEWS = ViewsConfig(local_crops=3, local_captions=4, local_image_size=12)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), (9, 1, 13))


@pytest.fixture
def opened(shards: Path) -> Iterator[Any]:
    """Makes loaders and closes them."""
    made: list[Loader] = []

    def make(sources: tuple[SourceConfig, ...] = (), **changes: Any) -> Loader:
        data = {name: changes.pop(name) for name in ("workers", "views", "max_bad_share") if name in changes}
        config = DataConfig(
            train=sources or (SourceConfig(path=str(shards)),), **{"workers": 0, "views": VIEWS, **data}
        )
        made.append(
            build_loader(config, **{"image_size": 20, "context_length": 24, "seed": 3, "batch_size": 4, **changes})
        )
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def take(loader: Loader, count: int) -> list[Batch]:
    return list(islice(iter(loader), count))


def same(a: Batch, b: Batch) -> bool:
    return (
        a.keys == b.keys
        and (a.position, a.next_position) == (b.position, b.next_position)
        and torch.equal(a.texts, b.texts)
        and len(a.images) == len(b.images)
        and all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))
    )


def joined(parts: list[Batch]) -> Batch:
    """The global batch of one step, from its ranks."""
    return Batch(
        images=[torch.cat(views) for views in zip(*(part.images for part in parts), strict=True)],
        texts=torch.cat([part.texts for part in parts], dim=1),
        keys=[key for part in parts for key in part.keys],
        position=parts[0].position,
        next_position=parts[0].next_position,
    )


def test_a_batch_has_the_contract_of_its_fields(opened: Any) -> None:
    batch = take(opened(), 1)[0]
    assert [tuple(image.shape) for image in batch.images] == [(4, 3, 20, 20)] * 2 + [(4, 3, 12, 12)] * 3
    assert all(image.dtype == torch.float32 and image.is_contiguous() for image in batch.images)
    assert all(-3 < float(image.min()) < float(image.max()) < 3 for image in batch.images)
    assert batch.texts.shape == (6, 4, 24)
    assert batch.texts.dtype == torch.int64
    assert (batch.texts[:, :, 0] == 49406).all()
    assert (batch.position, batch.next_position) == (0, 4)


def test_views_belong_to_their_sample(opened: Any, tmp_path: Path) -> None:
    """Images and captions stand in the row of their key, in every view."""
    from cosmos_fast.data.tokenizer import tokenize

    batch = take(opened(context_length=77), 1)[0]
    for row, key in enumerate(batch.keys):
        number = tokenize([str(int(key))])[0, 1:].tolist()
        digits = number[: number.index(49407)]
        for view in range(6):
            ids = batch.texts[view, row].tolist()
            assert any(ids[at : at + len(digits)] == digits for at in range(70)), (key, view)
    write_tar(tmp_path / "a.tar", {**sample(0)})
    alone = take(opened((SourceConfig(path=str(tmp_path)),), batch_size=3), 1)[0]
    assert alone.keys == ["000000"] * 3
    assert not torch.equal(alone.images[0][0], alone.images[0][1])  # another epoch, other numbers


def test_an_epoch_sees_every_sample_once(opened: Any) -> None:
    loader = opened(batch_size=SAMPLES)
    assert loader.samples_per_epoch == SAMPLES
    first, second = take(loader, 2)
    assert sorted(first.keys) == sorted(second.keys) == [f"{i:06d}" for i in range(SAMPLES)]
    assert first.keys != second.keys


@pytest.mark.parametrize(("world", "batch"), [(2, 8), (4, 4), (16, 1)])
def test_every_split_over_ranks_gives_the_same_global_batches(opened: Any, world: int, batch: int) -> None:
    whole = take(opened(batch_size=16), 3)
    ranks = [take(opened(batch_size=batch, rank=rank, world_size=world), 3) for rank in range(world)]
    for step in range(3):
        assert same(joined([rank[step] for rank in ranks]), whole[step])


def test_resume_continues_at_the_saved_position_on_another_number_of_ranks(opened: Any) -> None:
    whole = take(opened(batch_size=16), 5)
    position = whole[2].next_position
    ranks = [take(opened(batch_size=4, rank=rank, world_size=4, start_position=position), 2) for rank in range(4)]
    for step in range(2):
        assert same(joined([rank[step] for rank in ranks]), whole[3 + step])


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(opened: Any, workers: int) -> None:
    for ours, theirs in zip(take(opened(workers=workers), 8), take(opened(), 8), strict=True):
        assert same(ours, theirs)


def test_iterating_again_goes_on_and_close_keeps_the_place(opened: Any) -> None:
    whole = take(opened(), 6)
    loader = opened(workers=2)
    parts = take(loader, 2) + take(loader, 2)
    loader.close()
    parts += take(loader, 2)
    assert all(same(a, b) for a, b in zip(parts, whole, strict=True))


def test_seed_changes_order_and_views(opened: Any) -> None:
    first, other = take(opened(), 1)[0], take(opened(seed=4), 1)[0]
    assert first.keys != other.keys
    assert not torch.equal(first.images[0], other.images[0])


def test_mixture_honours_weights_and_walks_each_source(opened: Any, shards: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path, (5,), first=100)
    sources = (SourceConfig(path=str(shards)), SourceConfig(path=str(other), weight=2.0))
    loader = opened(sources, batch_size=11)
    assert loader.samples_per_epoch == SAMPLES + 10
    keys = [key for batch in take(loader, 3) for key in batch.keys]
    assert sorted(key for key in keys if key < "000100") == [f"{i:06d}" for i in range(SAMPLES)]
    assert sorted(key for key in keys if key >= "000100") == sorted([f"{i:06d}" for i in range(100, 105)] * 2)


def test_plain_clip_views_cost_nothing_more(opened: Any) -> None:
    views = ViewsConfig(global_crops=1, local_crops=0, global_captions=1, local_captions=0)
    batch = take(opened(views=views), 1)[0]
    assert [tuple(image.shape) for image in batch.images] == [(4, 3, 20, 20)]
    assert batch.texts.shape == (1, 4, 24)


def test_to_moves_the_images_and_leaves_captions_on_the_host(opened: Any) -> None:
    batch = take(opened(), 1)[0].to("meta")
    assert {image.device.type for image in batch.images} == {"meta"}
    assert batch.texts.device.type == "cpu"
    assert batch.position == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_recolouring_after_the_workers_gives_the_same_batches(opened: Any, workers: int) -> None:
    later = opened(workers=workers)
    later.stream.recolor = False  # what a GPU run does: the numbers travel with the crops
    for ours, theirs in zip(take(later, 3), take(opened(), 3), strict=True):
        assert same(ours, theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recolouring_on_the_gpu_gives_the_same_views(opened: Any) -> None:
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


def test_workers_use_one_thread(opened: Any) -> None:
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
    opened: Any, error: Exception, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it is killed while it hands over a batch; else it is the shards' own error, raised in a worker."""
    loader = opened(workers=1)
    next(iter(loader))
    if killed:
        (worker,) = loader._batches._workers
        worker.kill()
        with contextlib.suppress(RuntimeError):  # of torch's handler of SIGCHLD
            worker.join()

    def broken(_: object) -> None:
        raise error

    monkeypatch.setattr(type(loader._batches), "__next__", broken)
    with pytest.raises(UserError if killed else type(error), match="worker died" if killed else None):
        next(iter(loader))


def test_killed_worker_ends_in_one_clear_line_not_in_a_hang(opened: Any) -> None:
    loader = opened(workers=2)
    stream = iter(loader)
    next(stream)
    for worker in multiprocessing.active_children():
        worker.kill()
    start = time.monotonic()
    with pytest.raises(UserError, match="worker died"):
        list(islice(stream, 100))
    assert time.monotonic() - start < 30


def test_workers_leave_signals_to_the_trainer_and_end_with_it(opened: Any) -> None:
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
        worker.join(timeout=10)
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
    result = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True, check=False)
    assert result.returncode == ("Runtime" in end), result.stderr


def test_no_source_is_a_user_error(opened: Any) -> None:
    with pytest.raises(UserError, match=r"data\.train is empty"):
        build_loader(DataConfig(), image_size=20, context_length=24, seed=0, batch_size=2)


def test_stream_survives_pickling_for_spawned_workers(opened: Any) -> None:
    stream = opened().stream
    ours, theirs = pickle.loads(pickle.dumps(stream))[5], stream[5]
    assert ours.keys == theirs.keys
    assert torch.equal(ours.stacks[0].pixels, theirs.stacks[0].pixels)
