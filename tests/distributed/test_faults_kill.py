"""Two ranks under torchrun's elastic agent, killed and preempted: they go on from the last checkpoint, same samples."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cosmos_fast.cli.main import run
from cosmos_fast.cli.train import command
from cosmos_fast.engine.checkpoint import list_checkpoints, newest_valid
from tests.distributed import fault_runs as runs
from tests.distributed.fault_runs import BATCH, DEADLINE_S, STEPS, WORLD, Launch, begun, rows, stream
from tests.lives import is_running
from tests.shards import write_shards

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), counts=(20, 17))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The folder of one process that has trained on the same global batches."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Trainer, "train_step", runs.Trainer.train_step)  # what comes now is undone at the end
        runs.note_steps(folder / "trained_0.jsonl")
        line = runs.command_line(folder, shards, f"--set=run.batch_size={WORLD * BATCH}")
        assert run(command, line, name="cosmos-fast train") == 0
    return folder


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    """In the end the weights have seen each sample once, as if nothing had happened, and the run folder is whole."""
    assert stream(folder) == stream(undisturbed, world=1)
    found, expected = rows(folder), rows(undisturbed)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for row, other in zip(found, expected, strict=True):
        assert [row["loss"], row["grad_norm"]] == pytest.approx([other["loss"], other["grad_norm"]], rel=1e-4)
    root = folder / "run" / "checkpoints"
    assert newest_valid(root) == root / f"step_{STEPS:08d}"


def launch(folder: Path, shards: Path, *settings: str, **others: Any) -> Launch:
    """A life of the run that takes up where the last one ended."""
    return Launch(folder, shards, ("--resume", f"--set=run.batch_size={BATCH}", *settings), **others)


def wait_until(event: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not event():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_torchrun_starts_all_again_where_one_rank_is_killed(tmp_path: Path, shards: Path, undisturbed: Path) -> None:
    """Rank 0, which holds the run folder; the checkpoint of step 3 is the last."""
    life = launch(tmp_path, shards, faults={(0, 4): runs.killed}, max_restarts=1)
    assert life.run() == 0, life.said()
    assert begun(tmp_path) == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]  # nothing is lost beyond it
    assert_same_run(tmp_path, undisturbed)


def test_without_restarts_the_other_rank_ends_in_one_line(tmp_path: Path, shards: Path, undisturbed: Path) -> None:
    """Nothing is saved then: ranks that are fewer cannot."""
    life = launch(tmp_path, shards, faults={(1, 4): runs.killed}, prepare=runs.deaf_to_sigterm)
    assert life.run() != 0
    assert "rank 0 of 2 on" in life.said()
    assert "Traceback" not in life.said()
    assert newest_valid(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "step_00000003"
    assert launch(tmp_path, shards).run() == 0  # the folder is free
    assert begun(tmp_path, rank=1) == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert_same_run(tmp_path, undisturbed)


def test_all_ranks_and_their_launcher_killed(tmp_path: Path, shards: Path, undisturbed: Path) -> None:
    life = launch(tmp_path, shards, "--set=data.workers=1", faults={(rank, 4): runs.stopped for rank in range(WORLD)})
    agent = life.start()
    wait_until(lambda: all(5 in begun(tmp_path, rank) for rank in range(WORLD)))
    pids = life.pids()
    wait_until(lambda: all(is_stopped(pid) for pid in pids))
    for pid in (agent.pid, *pids):
        os.kill(pid, signal.SIGKILL)
    agent.join(DEADLINE_S)
    wait_until(lambda: not any(is_running(pid) for pid in pids))
    assert launch(tmp_path, shards).run() == 0
    assert begun(tmp_path) == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert_same_run(tmp_path, undisturbed)


def test_preempted_all_ranks_save_the_same_step_and_go_on_from_it(
    tmp_path: Path, shards: Path, undisturbed: Path
) -> None:
    """SIGTERM to torchrun, which hands it on; it does not count as a failure, and nothing starts again by itself."""
    life = launch(tmp_path, shards, faults={(rank, 4): runs.preempted for rank in range(WORLD)}, max_restarts=3)
    assert life.run() != 0  # torchrun's status after a signal
    assert "stopped by SIGTERM" in life.said()
    assert [begun(tmp_path, rank) for rank in range(WORLD)] == [[1, 2, 3, 4, 5]] * WORLD
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step_00000005"
    assert launch(tmp_path, shards).run() == 0
    assert begun(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]  # no step is done twice
    assert_same_run(tmp_path, undisturbed)


def test_sigterm_to_one_rank_alone_ends_the_run_well(tmp_path: Path, shards: Path, undisturbed: Path) -> None:
    """It stops all ranks after the same step, with status 0: torchrun has nothing to start again."""
    life = launch(tmp_path, shards, faults={(1, 4): runs.asked_to_stop}, max_restarts=3)
    assert life.run() == 0, life.said()
    assert [begun(tmp_path, rank) for rank in range(WORLD)] == [[1, 2, 3, 4, 5]] * WORLD
    assert launch(tmp_path, shards).run() == 0
    assert_same_run(tmp_path, undisturbed)
