"""Checkpoints that two ranks write in parts: exact in every stage, behind training, on full disks, with one killed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException

from cosmos_fast.engine import checkpoint
from cosmos_fast.engine.run_folder import plan_run
from cosmos_fast.model import load_checkpoint
from tests.distributed.checkpoint_runs import STAGES, STEPS, config_of, killed_while_writing, run_all
from tests.ranks import run_ranks
from tests.tiny_run import make_trainer

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
pytestmark = pytest.mark.slow

LAST = f"step_{STEPS:08d}"
ALONE = ("run.engine=plain", "deepspeed={}", "run.batch_size=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what two ranks have left, after a run of one process."""
    made = tmp_path_factory.mktemp("checkpoints")
    make_trainer(config_of(made, "alone", 1, *ALONE)).fit()
    run_ranks(run_all, 2, str(made))
    return made


def assert_equal(found: Path, expected: Path, *, with_generators: bool = False) -> None:
    """Bit for bit, and of the same moment. with_generators: also of the process, which one run may leave to another."""
    a, b = checkpoint.load(found), checkpoint.load(expected)
    assert (a.state, a.model) == (b.state, b.model)
    assert a.rng == b.rng or not with_generators
    for name in ("student", "teacher", "optimizer"):
        own, other = getattr(a, name), getattr(b, name)
        assert own.keys() == other.keys()
        assert all(torch.equal(own[key], other[key]) for key in own), name


def files_in(step: Path) -> set[str]:
    return {path.name for path in step.iterdir()}


def test_every_rank_writes_a_part_of_its_own(folder: Path) -> None:
    step = folder / "plain" / "checkpoints" / LAST
    parts = ["part_00000_of_00002.safetensors", "part_00001_of_00002.safetensors"]
    assert files_in(step) == {*parts, "state.json", "manifest.json"}
    sizes = [(step / part).stat().st_size for part in parts]
    assert max(sizes) < 0.6 * sum(sizes)
    whole = folder / "alone" / "checkpoints" / LAST
    assert files_in(whole) == {"student.safetensors", "teacher.safetensors", "optimizer.safetensors"} | {
        "state.json",
        "manifest.json",
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_passes_through_every_stage_unchanged(stage: int, folder: Path) -> None:
    assert "part_00001_of_00002.safetensors" in files_in(folder / f"passed_{stage}" / "checkpoints" / LAST)
    passed, alone = (folder / name / "checkpoints" / LAST for name in (f"passed_{stage}", "alone"))
    assert_equal(passed, alone, with_generators=True)


def test_and_on_to_one_process(folder: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, "back", 1, *ALONE)
    source = folder / "passed_3" / "checkpoints" / LAST
    trainer = make_trainer(config, plan=plan_run(config, str(source)))
    trainer.checkpointer.save(trainer)
    assert_equal(tmp_path / "back" / "checkpoints" / LAST, source, with_generators=True)
    model = load_checkpoint(folder / "passed_3", "student")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in trainer.student.state_dict().items())


def test_training_goes_on_while_a_checkpoint_is_written(folder: Path) -> None:
    """Of the state as it was at its step, though two more have changed it since."""
    seen = json.loads((folder / "seen.json").read_text())
    assert seen["2"] == seen["3"] == []
    root = folder / "behind" / "checkpoints"
    assert sorted(files_in(root)) == ["step_00000002", "step_00000004", LAST]
    for step in files_in(root):
        assert_equal(root / step, folder / "plain" / "checkpoints" / step)


@pytest.mark.parametrize("mode", ["off", "on"])
def test_a_disk_that_is_full_on_one_rank_stops_all_and_the_run_goes_on(mode: str, folder: Path) -> None:
    told = [json.loads((folder / f"full_{mode}_{rank}.json").read_text()) for rank in range(2)]
    assert [message for message, _ in told] == [
        "rank 1: checkpoint could not be written",
        "checkpoint could not be written",
    ]
    assert told[0][1] == ["step_00000002"]
    assert_equal(folder / f"full_{mode}" / "checkpoints" / LAST, folder / "plain" / "checkpoints" / LAST)


@pytest.mark.long
def test_a_rank_that_is_killed_while_it_writes_leaves_the_checkpoint_before(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_ranks(killed_while_writing, 2, str(tmp_path))
    root = tmp_path / "killed" / "checkpoints"
    assert [path.name for path in checkpoint.list_checkpoints(root)] == ["step_00000002"]
    assert_equal(root / "step_00000002", folder / "plain" / "checkpoints" / "step_00000002")
    config = config_of(tmp_path, "killed", 1, *ALONE)
    resumed = make_trainer(replace(config, name="killed"), plan=plan_run(config, "auto"))
    assert resumed.fit().step == STEPS
    assert files_in(root) == {"step_00000002", "step_00000004", LAST}  # nothing of the killed save is left
