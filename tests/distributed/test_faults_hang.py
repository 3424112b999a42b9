"""Ranks that hang, lag behind, or were started with something else than the others."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cosmos_fast.cli import start_up
from cosmos_fast.cli.main import run
from cosmos_fast.cli.train import command
from cosmos_fast.data.batch import Batch
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.utils import watchdog
from cosmos_fast.utils.watchdog import EXIT_HANGS, Watchdog
from tests.distributed import fault_runs as runs
from tests.distributed.fault_runs import BATCH, DEADLINE_S, FORKSERVER, STEPS, WORLD, Launch, begun, rows, stream
from tests.ranks import PRELOADED, run_ranks
from tests.shards import write_shards

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
pytestmark = pytest.mark.slow

HANGS = threading.Event()  # of this process


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), counts=(20, 17))


def launch(folder: Path, shards: Path, **others: Any) -> Launch:
    return Launch(folder, shards, ("--resume", f"--set=run.batch_size={BATCH}"), **others)


# a rank that hangs


def hang_in_the_optimizer(trainer: Trainer, launch: Launch) -> None:
    """A fault: the step never gets through the optimizer."""
    trainer.optimizer.step = _hang  # type: ignore[assignment, method-assign]


def _hang(**_: Any) -> None:
    HANGS.set()
    threading.Event().wait()


def _is_waiting() -> bool:
    """Whether the main thread has come to the innermost line of its wait, where it is to be found."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return frame.f_code is threading.Condition.wait.__code__ and frame.f_locals.get("gotit") is False


def time_passes_where_it_hangs(launch: Launch, life: int) -> None:
    """Watchdogs look often, and count time on a rank that hangs only: they wait for one that is slow."""

    def tick(dog: Watchdog) -> float:
        dog._wake.wait(0.02)
        return 1e6 if HANGS.is_set() and _is_waiting() else 0.0

    HANGS.clear()
    watchdog.TICK_S, watchdog.GRACE_S = 0.02, DEADLINE_S
    Watchdog._tick = tick  # type: ignore[method-assign]


@pytest.mark.long
def test_all_ranks_say_where_they_are_when_one_hangs_and_torchrun_starts_them_again(
    tmp_path: Path, shards: Path
) -> None:
    life = launch(
        tmp_path,
        shards,
        faults={(1, 4): hang_in_the_optimizer},
        prepare=time_passes_where_it_hangs,
        max_restarts=1,
    )
    assert life.run() == 0, life.said()
    stacks = [(tmp_path / "run" / f"stacks_rank_{rank}.txt").read_text() for rank in range(WORLD)]
    assert "rank 1: nothing has moved for" in stacks[1]
    assert "optimizer, 4 steps done, in wait (threading.py)" in stacks[1]
    assert "in _hang" in stacks[1]
    assert "rank 0: another rank hangs, this one is at: " in stacks[0]
    assert "in train_step" in stacks[0]
    assert all("; rank 1: optimizer, 4 steps done, in wait" in each for each in (*stacks, life.said()))
    assert "thread MainThread" in life.said()
    assert begun(tmp_path) == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, STEPS + 1))


def _alone(folder: Path, shards: Path) -> None:
    for stream_number in (1, 2):
        os.dup2(os.open(folder / "said.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream_number)
    multiprocessing.set_start_method("fork", force=True)
    time_passes_where_it_hangs(launch(folder, shards), 0)
    runs.note_steps(folder / "trained_0.jsonl", lambda trainer: _hang() if trainer.state.step == 1 else None)
    run(command, runs.command_line(folder, shards), name="cosmos-fast train")


def test_a_process_alone_ends_too(tmp_path: Path, shards: Path) -> None:
    FORKSERVER.set_forkserver_preload(PRELOADED)
    process = FORKSERVER.Process(target=_alone, args=(tmp_path, shards))
    process.start()
    process.join(DEADLINE_S)
    said = (tmp_path / "said.txt").read_text()
    assert process.exitcode == EXIT_HANGS, said
    assert "between phases, 1 steps done" in said
    assert "in _hang" in said
    assert "the run goes on from its last checkpoint with --resume" in (tmp_path / "run" / "log.txt").read_text()


def stop_for_good(trainer: Trainer, launch: Launch) -> None:
    """A fault: the whole process is stopped, its watchdog with it."""
    (launch.folder / "stopped").touch()
    os.kill(os.getpid(), signal.SIGSTOP)


def time_passes_beside_a_stopped_rank(launch: Launch, life: int) -> None:
    """On rank 0, in the first life, as soon as rank 1 has stopped and rank 0 is in the same step."""

    def tick(dog: Watchdog) -> float:
        dog._wake.wait(0.02)
        passes = life == 0 and dog._rank == 0 and (launch.folder / "stopped").exists() and 5 in begun(launch.folder)
        return 1e6 if passes else 0.0

    watchdog.TICK_S, watchdog.GRACE_S = 0.02, 3.0
    Watchdog._tick = tick  # type: ignore[method-assign]


@pytest.mark.long
def test_a_rank_that_is_stopped_is_missed_by_the_others(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {(1, 4): stop_for_good}
    life = launch(tmp_path, shards, faults=faults, prepare=time_passes_beside_a_stopped_rank, max_restarts=1)
    life.shutdown_s = 1
    assert life.run() == 0, life.said()
    assert "; rank 1: no word" in (tmp_path / "run" / "stacks_rank_0.txt").read_text()
    assert not (tmp_path / "run" / "stacks_rank_1.txt").exists()
    assert begun(tmp_path) == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]


# a rank that lags behind


def lag_behind(launch: Launch, life: int) -> None:
    """Rank 1 gets each of its batches only after rank 0 has begun its step, and an hour later by the clock."""
    if os.environ["RANK"] != "1":
        return
    fetch, train_step = Trainer._fetch, Trainer.train_step

    def late(trainer: Trainer, batches: Iterator[Batch]) -> list[Batch]:
        deadline = time.monotonic() + DEADLINE_S
        while trainer.state.step + 1 not in begun(launch.folder, 0):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return fetch(trainer, batches)

    def train_late(trainer: Trainer, batches: list[Batch], data_ms: float = 0.0) -> Any:
        return train_step(trainer, batches, data_ms + 3.6e6)

    Trainer._fetch, Trainer.train_step = late, train_late  # type: ignore[method-assign]


@pytest.mark.long
def test_a_slow_loader_of_one_rank_holds_the_others_and_is_named(tmp_path: Path, shards: Path) -> None:
    assert launch(tmp_path / "prompt", shards).run() == 0
    life = launch(tmp_path / "late", shards, prepare=lag_behind)
    assert life.run() == 0, life.said()
    assert stream(tmp_path / "late") == stream(tmp_path / "prompt")
    late, prompt = rows(tmp_path / "late"), rows(tmp_path / "prompt")
    assert [row["loss"] for row in late] == pytest.approx([row["loss"] for row in prompt], rel=1e-5)
    assert all(row["data_slowest_rank"] == row["slowest_rank"] == 1 for row in late)
    assert all(row["data_ms_slowest_rank"] >= 3.6e6 for row in late)
    assert all(row["data_ms"] >= 1.8e6 and row["data_stall_pct"] > 90 for row in late)


# a rank that was started with something else


def settings(folder: Path, shards: str, *more: str) -> list[str]:
    return [*runs.command_line(folder, Path(shards), f"--set=run.batch_size={BATCH}"), *more]


def _started(folder: Path, shards: Path) -> None:
    """Every case, one after the other; what each rank says goes to <folder>/<case>_<rank>.txt."""
    rank = int(os.environ["RANK"])
    other = rank == 1
    os.chdir(shards.parent / "other" if other else shards.parent)
    cases: dict[str, list[str]] = {
        "seed": ["--set=seed=7"] if other else [],
        "settings": ["--set=optimizer.lr=1e-4", "--set=run.accumulate_steps=2"] if other else [],
        "data": ["--set=data.train=shards"],
        "code": [],
    }
    for name, more in cases.items():
        found = start_up.program()
        program = {**found, "cosmos-fast's code": "0123456789ab"} if other and name == "code" else found
        start_up.program = lambda program=program: program  # type: ignore[assignment, misc]
        said = (folder / f"{name}_{rank}.txt").open("w", buffering=1)
        sys.stderr = said
        status = run(command, settings(folder / name, str(shards), *more), name="cosmos-fast train")
        said.write(json.dumps(status))
        said.close()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("started")
    (shards.parent / "other").mkdir(exist_ok=True)
    write_shards(shards.parent / "other" / "shards", counts=(20, 16))
    write_shards(shards.parent / "shards", counts=(20, 17))
    run_ranks(_started, WORLD, folder, shards)
    return folder


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("seed", "rank 1 differs from rank 0: seed is 7 instead of 0: start all ranks with the same command"),
        ("settings", "optimizer.lr is 0.0001 instead of 0.001, run.accumulate_steps is 2 instead of 1: start all"),
        ("data", "the data is 36 samples"),
        ("code", "cosmos-fast's code is 0123456789ab instead of"),
    ],
)
def test_a_rank_that_was_started_with_something_else_ends_all_in_one_line(
    case: str, expected: str, started: Path
) -> None:
    for rank in range(WORLD):
        said = (started / f"{case}_{rank}.txt").read_text()
        assert expected in said
        assert said.endswith("2")
        assert len([line for line in said.splitlines() if "differs" in line]) == 1
    assert not (started / case / "run").exists()
