"""Exact position: kill -9 at random moments, other ranks and workers after it, and no sample is lost or seen twice."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from cosmos_fast.config import DaliConfig, DataConfig, SourceConfig, ViewsConfig
from cosmos_fast.data import dali_pipeline
from cosmos_fast.data.identity import data_identity
from cosmos_fast.data.index import open_source
from cosmos_fast.data.loader import Loader, build_loader
from tests.lives import Run, Split, is_running, killed_at_random
from tests.loaders import LOADERS
from tests.shards import sample, write_shards, write_tar

SAMPLES = 101  # no multiple of any batch below: epochs end in the middle of a batch
VIEWS = ViewsConfig(global_crops=1, local_crops=1, global_captions=1, local_captions=1, local_image_size=8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uneven shards, fewer than ranks x workers; two samples are broken, so that substitutes are part of the order."""
    folder = write_shards(tmp_path_factory.mktemp("shards"), (60, 1, SAMPLES - 63))
    broken = {**sample(900), **sample(901)}
    broken["000900.jpg"] = broken["000900.jpg"][:200]
    broken["000901.json"] = b"{"
    write_tar(folder / "00003.tar", broken)
    return folder


class Make:
    """Makes the loader of one rank."""

    def __init__(self, kind: str, shards: Path) -> None:
        self.kind = kind
        self.shards = shards
        dali_pipeline.why_unusable("cpu")  # imports DALI here, not in every process of every life

    def __call__(self, split: Split, rank: int, start: int) -> Loader:
        config = DataConfig(
            train=(SourceConfig(path=str(self.shards)),),
            views=VIEWS,
            workers=split.workers,
            loader=self.kind,  # type: ignore[arg-type]
            dali=DaliConfig(threads=1),
        )
        return build_loader(
            config,
            image_size=16,
            context_length=16,
            seed=5,
            batch_size=split.batch_size,
            rank=rank,
            world_size=split.ranks,
            start_position=start,
        )


@pytest.fixture(scope="module", params=LOADERS)
def make(request: pytest.FixtureRequest, shards: Path) -> Make:
    return Make(request.param, shards)


@pytest.fixture(scope="module")
def whole(make: Make, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    """Five epochs without a kill, on one rank without workers."""
    run = Run(tmp_path_factory.mktemp("whole"), make)
    run.live(Split(1, 0, 16), stop=5 * SAMPLES)
    return run.history()


def test_an_epoch_without_a_kill_holds_every_sample_once(whole: list[tuple[str, int]]) -> None:
    first, second = ([key for key, _ in part] for part in (whole[:SAMPLES], whole[SAMPLES : 2 * SAMPLES]))
    good = {f"{number:06d}" for number in range(SAMPLES - 2)}
    for epoch in (first, second):
        assert len(epoch) == SAMPLES
        assert set(epoch) == good  # every good sample; two of them once more, for the broken ones
    assert first != second


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 6))])
def test_kill_9_at_random_moments_changes_nothing_that_is_seen(
    seed: int, make: Make, whole: list[tuple[str, int]], tmp_path: Path
) -> None:
    history = killed_at_random(Run(tmp_path, make), seed, SAMPLES + 20)
    assert history == whole[: len(history)]


def test_a_kill_costs_the_steps_since_the_last_save_and_ends_the_workers(make: Make, tmp_path: Path) -> None:
    """What the lives lean on: steps after the last save are done again, and orphaned workers end and leave nothing."""
    run = Run(tmp_path, make)
    run.live(Split(1, 2, 6), stop=5 * 6, when=lambda steps: steps >= 5)
    lost = [note["position"] for note in run.notes(0, 0) if note["position"] >= run.position]
    assert lost == [24]  # the fifth step; the fourth was saved
    assert len(run.workers) == 2
    run.live(Split(1, 0, 6), stop=run.position + 12)
    assert run.notes(1, 0)[0]["position"] == lost[0]
    deadline = time.monotonic() + 120
    while any(map(is_running, run.workers)):  # nobody is left to stop them: they see it and end
        assert time.monotonic() < deadline, "loader workers outlive their killed trainer"
        time.sleep(0.1)
    assert not [file for pid in run.workers for file in Path("/dev/shm").glob(f"torch_{pid}_*")]


def test_data_has_a_name_that_follows_its_samples_and_not_its_place(shards: Path, tmp_path: Path) -> None:
    def identity(folder: Path) -> str:
        return data_identity([open_source(SourceConfig(path=str(folder)))])

    copied = tmp_path / "copied"
    shutil.copytree(shards, copied, ignore=shutil.ignore_patterns(".*"))
    assert identity(copied) == identity(shards)
    assert identity(copied).startswith("101 samples, ")
    names = {identity(copied)}
    write_tar(copied / "00004.tar", sample(950))
    names.add(identity(copied))
    (copied / "00000.tar").unlink()
    names.add(identity(copied))
    (copied / "00001.tar").rename(copied / "00000.tar")
    names.add(identity(copied))
    assert len(names) == 4
