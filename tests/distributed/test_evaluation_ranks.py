"""Evaluation divided over three ranks: the numbers of one process, to the last bit, with any number of blocks."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from cosmos_fast.config import TrainConfig
from cosmos_fast.data.synthetic.writer import DatasetSettings, write_dataset
from cosmos_fast.evaluate import prompts, scenes, segmented_sets
from cosmos_fast.evaluate.datasets.registry import READERS
from cosmos_fast.utils.ranks import ONE
from tests.distributed.evaluation_runs import BLOCKS, FAILS, SET_BLOCKS, measured, measured_sets, run_all, run_cli
from tests.fake_sets import FAKE_READERS
from tests.ranks import run_ranks
from tests.unit.test_eval_cli import tiny_config, write_run

pytestmark = pytest.mark.slow

WORLD = 3


def break_image(shard: Path, place: int) -> None:
    """The image of one sample becomes something else."""
    with tarfile.open(shard) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar.getmembers()]  # type: ignore[union-attr]
    images = [
        i for i, (info, _) in enumerate(members) if info.name.endswith((".jpg", ".png")) and "mask" not in info.name
    ]
    with tarfile.open(shard, "w") as tar:
        for i, (info, data) in enumerate(members):
            content = b"no image" if i == images[place] else data
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("divided")
    write_dataset(folder / "data", DatasetSettings(train=4, heldout=12), workers=1)
    break_image(folder / "data/heldout/00000.tar", 6)  # in the second block
    config = tiny_config("demo", folder / "data")
    write_run(folder / "cosmos", config)
    return config


@pytest.fixture(scope="module")
def place(config: TrainConfig) -> Path:
    return Path(config.data.train[0].path).parent.parent


@pytest.fixture(scope="module")
def found(place: Path, config: TrainConfig) -> list[dict[str, Any]]:
    run_ranks(run_all, WORLD, place, config, str(place))
    return [json.loads((place / f"{rank}.json").read_text()) for rank in range(WORLD)]


def test_all_ranks_get_the_numbers_of_one_process(
    place: Path, config: TrainConfig, found: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "TEXT_BATCH", prompts.TEXT_BATCH)  # measured() changes both
    monkeypatch.setattr(scenes, "BLOCK", scenes.BLOCK)
    alone = json.loads(json.dumps(measured(place, config, ONE)))
    assert len(alone) == 5 * len(BLOCKS)
    assert alone["retrieval 5"]["protocol"]["images"] == 11
    assert sum(alone["skipped 5"].values()) == 1
    for name, expected in alone.items():
        for own in found:
            assert own[name] == expected, name


def test_all_ranks_get_the_numbers_of_one_process_on_published_sets(
    place: Path, found: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "TEXT_BATCH", prompts.TEXT_BATCH)  # measured_sets() changes these
    monkeypatch.setattr(segmented_sets, "IMAGES_A_BLOCK", segmented_sets.IMAGES_A_BLOCK)
    for name, reader in FAKE_READERS.items():
        monkeypatch.setitem(READERS, name, reader)
    alone = json.loads(json.dumps(measured_sets(place, ONE)))
    assert len(alone) == len(FAKE_READERS) * len(SET_BLOCKS) + 1
    assert alone["things 2"]["protocol"]["images"] == 7
    for own in found:
        assert own["sets"] == alone


def test_where_one_rank_has_a_broken_image_all_stop_and_say_which(found: list[dict[str, Any]]) -> None:
    for rank, own in enumerate(found):
        assert own["set failure"] == ("" if rank == FAILS else f"rank {FAILS}: ") + "fake: 2.jpg is broken"


def test_where_one_rank_cannot_read_all_stop_and_say_why(found: list[dict[str, Any]]) -> None:
    for rank, own in enumerate(found):
        assert own["failure"] == ("the disk has gone" if rank == FAILS else f"rank {FAILS}: the disk has gone")


def test_the_command_writes_one_file_with_the_same_numbers(place: Path, found: list[dict[str, Any]]) -> None:
    run_ranks(run_cli, WORLD, place, str(place / "result.json"))
    content = json.loads((place / "result.json").read_text())
    assert content["tasks"]["retrieval"]["metrics"] == pytest.approx(found[0]["retrieval 5"]["metrics"])
    assert content["data"]["skipped"] == found[0]["skipped 5"]
    assert content["data"]["samples"] == 12
    assert len(content["data"]["sha256"]) == 64
    fake = content["benchmarks"]["fake"]
    assert fake["metrics"] == found[0]["sets"][f"fake {SET_BLOCKS[0]}"]["metrics"]
    assert fake["protocol"] == found[0]["sets"][f"fake {SET_BLOCKS[0]}"]["protocol"]
