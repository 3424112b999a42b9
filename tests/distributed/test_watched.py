"""What several ranks say of themselves: metrics over all of them, and logs that tell who speaks and when."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cosmos_fast.engine.metrics import read_rows
from tests.distributed.deepspeed_runs import BAD_STEP
from tests.distributed.watched_runs import PROFILED_STEPS, STAGES, TRAINED, run_all
from tests.ranks import run_ranks

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
pytestmark = pytest.mark.slow

WORLD = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("watched")
    run_ranks(run_all, WORLD, str(made))
    return made


@pytest.mark.parametrize("stage", STAGES)
def test_rows_tell_of_all_ranks(stage: int, folder: Path) -> None:
    rows = [row for row in read_rows(folder / f"stage{stage}" / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2, 4, 5]
    for row in rows:
        assert 0 < row["communication_ms"] < row["step_ms"]
        assert 0 <= row["wait_ms"] < row["communication_ms"]
        assert 0 < row["samples_per_s_slowest_rank"] <= row["samples_per_s_fastest_rank"]
        # Whoever never waits is at least as fast as all are together.
        assert row["samples_per_s"] / WORLD < row["samples_per_s_fastest_rank"]
        assert 0 < row["least_peak_memory_mib"] <= row["peak_memory_mib"]
        assert {row[name] for name in ("slowest_rank", "data_slowest_rank", "peak_memory_rank")} <= set(range(WORLD))
        assert row["bad_samples"] == 3
    assert rows[-1]["flops"] == pytest.approx(5 * rows[0]["flops"])


def test_every_rank_evaluates_as_much_as_it_has_and_the_training_goes_on_as_it_was(folder: Path) -> None:
    kept = [read_rows(folder / f"stage{stage}" / "metrics.jsonl") for stage in STAGES]
    for own, other in zip(*kept, strict=True):
        names = ("loss", "grad_norm") if own["kind"] == "train" else ("student", "teacher")
        assert [own[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-4, nan_ok=True)
    evaluated = [row for row in kept[0] if row["kind"] == "eval"]
    assert [row["step"] for row in evaluated] == [2, 4, 5]
    assert len({row[name] for row in evaluated for name in ("student", "teacher")}) == 6


@pytest.mark.parametrize("stage", STAGES)
def test_every_line_of_the_log_carries_rank_and_step(stage: int, folder: Path) -> None:
    lines = (folder / f"stage{stage}" / "log.txt").read_text().splitlines()
    places = [re.fullmatch(r"[-\d]+ [:,\d]+ [A-Z]+ \[rank (\d+) step (\d+)\] (.*)", line) for line in lines]
    assert all(places)
    assert {place[1] for place in places if place} == {"0"}
    said = {place[3].split("  ")[0]: int(place[2]) for place in places if place}
    assert said["step 4/5"] == 4
    assert next(step for text, step in said.items() if "2 ranks on" in text) == 0
    assert any("communication" in line and "slowest" in line for line in lines)


def test_what_several_ranks_say_on_a_terminal_can_be_told_apart(folder: Path) -> None:
    for rank in range(WORLD):
        lines = (folder / f"stderr{rank}").read_text().partition(TRAINED)[0].splitlines()
        assert lines
        assert all(re.match(rf"\[rank {rank} step \d+\] ", line) for line in lines), lines
        bad = [line for line in lines if "step not applied" in line]
        assert len(bad) == len(STAGES)
        assert all(line.startswith(f"[rank {rank} step {BAD_STEP + 1}] warning: ") for line in bad)
        assert any("samples/s" in line for line in lines) == (rank == 0)


def test_a_profile_has_a_ledger_of_every_rank_with_its_communication(folder: Path) -> None:
    found, other = (json.loads((folder / f"profile{rank}.json").read_text()) for rank in range(WORLD))
    assert {name: value for name, value in other.items() if name not in ("operators", "files", "peak")} == {
        name: value for name, value in found.items() if name not in ("operators", "files", "peak")
    } | {"mfu_pct": None, "mfu_unpruned_pct": None}
    assert len(found["ranks"]) == WORLD
    for ledger in (*found["ranks"], found["ledger"]):
        assert sum(ledger["phase_ms"].values()) == pytest.approx(ledger["wall_ms"])
        assert ledger["phase_ms"]["communication"] > 0
        assert ledger["steps"] == PROFILED_STEPS
    walls = [ledger["wall_ms"] for ledger in found["ranks"]]
    assert found["ledger"]["wall_ms"] == pytest.approx(sum(walls) / WORLD)
    assert found["samples"] == 4 * WORLD
    assert found["mfu_pct"] == pytest.approx(100 * found["flops"] / (found["ledger"]["wall_ms"] / 1e3) / (WORLD * 1e11))
    assert {path.name for path in (folder / "profiled").rglob("*") if path.is_file()} == {"ledger.json", "trace.json"}
    stored = json.loads((folder / "profiled/profile/ledger.json").read_text())
    assert stored["ranks"] == found["ranks"]
    shown = (folder / "profile.txt").read_text()
    assert re.search(r"3 steps on 2 ranks, each on cpu", shown)
    assert re.search(r"communication .*\(rank \d\).*\(rank \d\)", shown)
