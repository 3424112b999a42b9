"""`cosmos-fast data coverage`: its arithmetic is what the loaders of all ranks and workers do."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from cosmos_fast.cli.main import command, run
from cosmos_fast.config import DataConfig, SourceConfig, ViewsConfig
from cosmos_fast.data import coverage
from cosmos_fast.data.coverage import Seen, Split
from cosmos_fast.data.loader import build_loader
from cosmos_fast.data.order import SampleOrder
from tests.shards import write_shards

SPLITS = [Split(1, 0, 1), Split(1, 3, 7), Split(3, 2, 4), Split(5, 4, 3), Split(2, 9, 50), Split(7, 1, 1)]
VIEWS = ViewsConfig(global_crops=1, local_crops=0, global_captions=1, local_captions=0)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("samples", [1, 12, 97, 100])
def test_a_walk_finds_what_the_arithmetic_says(split: Split, samples: int) -> None:
    order = SampleOrder([samples], [1.0], seed=2)
    found = coverage.walk(order, samples, split)
    assert found.times == [Counter({1: samples})]
    assert np.array_equal(found.made, coverage.samples_of_workers(samples, split))
    assert found.made.sum() == samples


@pytest.mark.parametrize("sizes", [[40, 10], [17, 29, 5], [1, 100], [8, 8, 8, 8, 8]])
@pytest.mark.parametrize("weights", [[1.0] * 5, [0.3, 2.0, 0.7, 1.5, 5.0]])
def test_draws_of_each_source_are_those_of_the_positions_before(sizes: list[int], weights: list[float]) -> None:
    order = SampleOrder(sizes, weights[: len(sizes)], seed=1)
    times = [Counter[int]() for _ in sizes]
    for position in range(400):
        assert order.draws(position) == [part.total() for part in times]
        for seen, part in zip(coverage.seen_by(order, position), times, strict=True):
            often = Counter(part.values())
            assert often[seen.times + 1] == seen.more
            assert sum(often.values()) == (seen.samples if seen.times else seen.more)
            assert seen.draws == part.total()
        place = order.locate(position)
        times[place.source][place.sample] += 1


def test_a_walk_of_a_later_epoch_and_of_a_mixture() -> None:
    order = SampleOrder([30, 7], [1.0, 2.0], seed=0)
    for epoch in range(3):
        found = coverage.walk(order, order.samples_per_epoch, Split(3, 2, 5), epoch)
        assert found.times == [Counter({1: 30}), Counter({2: 7})]


def test_workers_of_real_loaders_make_that_many(tmp_path: Path) -> None:
    """One epoch through the loaders of every rank; a worker is told by the turn of its batch."""
    shards, split = write_shards(tmp_path, (11, 1, 18)), Split(2, 3, 4)
    made, keys = np.zeros((2, 3), dtype=int), Counter[str]()
    config = DataConfig(train=(SourceConfig(path=str(shards)),), views=VIEWS, workers=split.workers)
    for rank in range(split.ranks):
        loader = build_loader(config, image_size=8, context_length=8, seed=0, batch_size=4, rank=rank, world_size=2)
        for turn, batch in enumerate(islice(loader, 4)):
            inside = [key for n, key in enumerate(batch.keys) if batch.position + rank * 4 + n < 30]
            keys.update(inside)
            made[rank, turn % 3] += len(inside)
        loader.close()
    assert keys == Counter({f"{number:06d}": 1 for number in range(30)})
    assert np.array_equal(made, coverage.samples_of_workers(30, split))


def test_whole_shards_leave_samples_out_where_they_do_not_divide() -> None:
    split = Split(2, 2, 5)
    assert coverage.unseen_with_whole_shards(np.full(8, 10), split) == 0
    # One worker has two shards and all stop after ceil(50 / 10 / 2) * 5 = 15 samples.
    assert coverage.unseen_with_whole_shards(np.full(5, 10), split) == 5
    # As many samples, in shards as uneven as can be: 46 in one.
    assert coverage.unseen_with_whole_shards(np.array([46, 1, 1, 1, 1]), split) == 31 + 1


def test_seen_in_words() -> None:
    assert coverage._times(Seen(10, 2, 0)) == "every sample comes up twice"
    assert coverage._times(Seen(10, 3, 4)) == "every sample comes up 3 times, 4 of them once more"
    assert coverage._times(Seen(10, 0, 4)) == "4 samples come up once, 6 never"


def test_the_command_says_what_a_run_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_shards(tmp_path, (11, 1, 18))
    arguments = ["--ranks", "2", "--workers", "3", "--batch-size", "4", "--epochs", "2.5", "--walk"]
    assert run(command, ["data", "coverage", str(shards), *arguments]) == 0
    text = capsys.readouterr().out
    assert "30 samples in 3 shards of 1 to 18" in text
    assert "an epoch: 30 samples; every sample exactly once" in text
    assert "a step: 8 samples (2 ranks x 4 samples); an epoch is 3 steps and 6 samples of the next" in text
    assert "the run: 9 steps, 72 samples, 2.4 epochs; the last epoch ends after 12 of its samples" in text
    assert "every sample comes up twice, 12 of them once more" in text
    assert "a rank makes 14 to 16 samples of the first epoch, a worker 4 to 8" in text
    assert "walked the first epoch, position by position: 30 once: as computed" in text


def test_settings_come_from_a_recipe_or_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_shards(tmp_path / "a", (6,)), write_shards(tmp_path / "b", (4,))
    sources = f"data.train=[{{path: {a}}}, {{path: {b}, weight: 1.5}}]"
    settings = ["--recipe", "cc3m_vit_b_16", "--set", sources, "--set", "data.samples_per_epoch=null"]
    assert run(command, ["data", "coverage", *settings, "--walk"]) == 0
    text = capsys.readouterr().out
    assert "(16 ranks x 64 samples)" in text
    assert "weight 1.5" in text
    assert "an epoch: 12 samples; source 1: every sample comes up once; source 2: every sample comes up once, 2" in text
    assert "as computed" in text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "no data source"),
        (["--recipe", "demo", "--config", "x.yaml"], "give one of them"),
        (["/nowhere"], "missing"),
        (["--set", "data.trian=x"], "unknown configuration key"),
    ],
)
def test_mistakes_are_one_line(wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, ["data", "coverage", *wrong]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "\n" not in error.strip()


def test_window_order_covers_an_epoch_exactly_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_shards(tmp_path, (11, 1, 18))
    settings = ["--set", "data.order=window", "--set", "data.window_pieces=2", "--set", "data.remote.piece_mib=0.01"]
    assert (
        run(command, ["data", "coverage", str(shards), "--ranks", "3", "--batch-size", "4", *settings, "--walk"]) == 0
    )
    assert "30 once: as computed" in capsys.readouterr().out
