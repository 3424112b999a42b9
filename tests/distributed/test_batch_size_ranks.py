"""The batch-size search on several ranks: all take the most that one of them needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cosmos_fast.engine.batch_ranks import OthersFailed, SearchRanks
from cosmos_fast.engine.batch_trial import measure_peak
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.network import LostRanks
from cosmos_fast.utils.ranks import place_of_environment
from tests.ranks import run_ranks
from tests.tiny_run import tiny_config

pytestmark = pytest.mark.slow

WORLD, GIB = 2, 2**30


def _agree(folder: str) -> None:
    """Rounds with answers that are made up, the second and the third of which fail on one rank."""
    place = place_of_environment()
    ranks = SearchRanks.of(place)
    found: dict[str, Any] = {"limit": min(ranks.gather(100 - place.rank))}

    def give_up() -> int:
        if place.rank == 1:
            raise UserError("this cannot be trained")
        while not ranks.someone_failed():  # a child that waits for the other rank's
            pass
        return 5

    def lose_each_other(way: str) -> int | None:
        if way == "out of memory" and place.rank == 1:  # whose child is ended, at which that of rank 0 loses it
            return None
        if way == "cut" and place.rank == 0:
            raise OthersFailed
        raise LostRanks("the other one is gone")

    found["most"] = ranks.largest(lambda: 10 + place.rank)
    found["none"] = ranks.largest(lambda: None if place.rank == 0 else 7)
    try:
        ranks.largest(give_up)
    except UserError as error:
        found["failure"] = str(error)
    for way in ("out of memory", "cut"):
        try:
            found[way] = ranks.largest(lambda way=way: lose_each_other(way))
        except UserError as error:
            found[way] = str(error)
    found["after"] = ranks.largest(lambda: 3)
    found["meeting"] = ranks.meeting
    Path(folder, f"{place.rank}.json").write_text(json.dumps(found))
    ranks.close()


def test_ranks_agree_without_a_process_group(tmp_path: Path) -> None:
    run_ranks(_agree, WORLD, str(tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD)]
    failures = [one.pop("failure") for one in found]
    assert failures == ["rank 1: this cannot be trained", "this cannot be trained"]
    assert found[0] == found[1]
    assert found[0].pop("meeting").endswith("_8")
    assert found[0] == {
        "limit": 99,
        "most": 11,
        "none": None,
        "out of memory": None,
        "cut": "rank 1: the other one is gone",
        "after": 3,
    }


def test_one_process_asks_nobody() -> None:
    ranks = SearchRanks()
    assert ranks.largest(lambda: 4) == 4
    assert not ranks.someone_failed()
    assert ranks.meeting == ""
    ranks.close()


def _measure(folder: str) -> None:
    """Real steps: a size that fits, one that one rank has no room for, and what cannot be trained."""
    place = place_of_environment()
    ranks = SearchRanks.of(place)
    config = tiny_config(Path(folder) / "runs")
    found: dict[str, Any] = {"peak": measure_peak(config, 2, 100 * GIB, ranks)}
    found["too much"] = measure_peak(config, 2, 100 * GIB if place.rank == 0 else 2**20, ranks)
    try:
        measure_peak(tiny_config(Path(folder) / "runs", "compute.optimizer=torch"), 2, 100 * GIB, ranks)
    except UserError as error:
        found["failure"] = str(error)
    Path(folder, f"{place.rank}.json").write_text(json.dumps(found))
    ranks.close()


@pytest.mark.long
def test_steps_of_all_ranks_are_measured_in_children_that_meet_each_other(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    run_ranks(_measure, WORLD, str(tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD)]
    assert found[0]["peak"] == found[1]["peak"] > 2**27
    assert all(one["too much"] is None for one in found)
    assert all("set compute.optimizer=fused" in one["failure"] for one in found)
    assert not (tmp_path / "runs").exists()
