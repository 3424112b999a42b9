"""Two ranks under DeepSpeed, every ZeRO stage, against the trainer of one process at the same global batch."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_fast.engine.run_folder import plan_run
from cosmos_fast.utils.ranks import Ranks
from tests.distributed.deepspeed_runs import BAD_STEP, CASES, STEPS, config_of, run_case, run_cases
from tests.ranks import run_ranks
from tests.tiny_run import make_trainer

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what two ranks have made of all cases, in one launch."""
    made = tmp_path_factory.mktemp("deepspeed")
    run_ranks(run_cases, 2, str(made))
    return made


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(case) -> what one process without DeepSpeed makes of it; stages do not matter to it."""
    made = tmp_path_factory.mktemp("alone")

    @functools.cache
    def run(name: str) -> dict[str, Any]:
        return run_case(name, made, Ranks(), "run.engine=plain", "deepspeed={}")

    return run


def by_weight(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """All as one vector without biases of attention keys: their gradient is zero, and Adam enlarges its rounding."""
    kept = []
    for name, tensor in tensors.items():
        parts = tensor.chunk(3) if name.endswith("in_proj_bias") else [tensor]
        kept += [part.double().flatten() for i, part in enumerate(parts) if len(parts) == 1 or i != 1]
    return torch.cat(kept)


def off(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative distance over all weights."""
    assert found.keys() == expected.keys()
    a, b = by_weight(found), by_weight(expected)
    return float((a - b).norm() / b.norm())


def rows_of(run: dict[str, Any], kind: str = "train") -> list[dict[str, Any]]:
    return [row for row in run["rows"] if row["kind"] == kind]


def assert_same_run(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    for part in ("student", "teacher"):
        assert off(found[part], expected[part]) < tolerance, part
    moments = [{k: v for k, v in run["optimizer"].items() if not k.startswith("step/")} for run in (found, expected)]
    assert off(*moments) < 10 * tolerance
    steps = [{k: int(v) for k, v in run["optimizer"].items() if k.startswith("step/")} for run in (found, expected)]
    assert steps[0] == steps[1]
    assert found["state"] == pytest.approx(expected["state"])
    for own, other in zip(rows_of(found), rows_of(expected), strict=True):
        for name in ("step", "loss", "clip_loss", "distill_loss", "lr", "ema_decay", "grad_norm", "logit_scale"):
            expected_number = other[name]  # None where it is not finite, as the norm that overflows in fp16
            if expected_number is not None:
                expected_number = pytest.approx(expected_number, rel=10 * tolerance, nan_ok=True)
            assert own[name] == expected_number, (own["step"], name)


@pytest.mark.parametrize("stage", range(4))
def test_twenty_steps_are_those_of_one_process(stage: int, folder: Path, alone: Any) -> None:
    found, expected = torch.load(folder / f"stage{stage}.pt"), alone("stage0")
    assert len(rows_of(found)) == STEPS
    assert max(row["grad_norm"] for row in rows_of(expected)) > 0.5  # clipping does something
    assert_same_run(found, expected)
    assert all(row["data_ms_slowest_rank"] >= row["data_ms"] for row in rows_of(found))
    validated = [[row[name] for name in ("step", "student_norm", "teacher_norm")] for row in rows_of(found, "eval")]
    assert [row[0] for row in validated] == [8, 16, 20]
    alone_too = [[row[name] for name in ("step", "student_norm", "teacher_norm")] for row in rows_of(expected, "eval")]
    assert validated == [pytest.approx(row, rel=1e-5) for row in alone_too]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_teacher_in_parts_is_the_whole_one(stage: int, folder: Path) -> None:
    """To the last bit: it runs on the same numbers, which are there for the pass only."""
    found, whole = torch.load(folder / f"parts_stage{stage}.pt"), torch.load(folder / f"stage{stage}.pt")
    assert (found["teacher_values"], len(rows_of(found)), len(rows_of(found, "eval"))) == (0, STEPS, 3)
    for part in ("student", "teacher", "optimizer", "whole_teacher"):
        assert all(torch.equal(tensor, found[part][name]) for name, tensor in whole[part].items()), part
    for kind, names in (("train", ("loss", "distill_loss", "grad_norm")), ("eval", ("student_norm", "teacher_norm"))):
        for own, other in zip(rows_of(found, kind), rows_of(whole, kind), strict=True):
            assert [own[name] for name in names] == [other[name] for name in names], own["step"]


@pytest.mark.parametrize("stage", range(4))
def test_the_teacher_that_runs_is_the_average(stage: int, folder: Path) -> None:
    found = torch.load(folder / f"stage{stage}.pt")
    assert all(torch.equal(found["whole_teacher"][name], found["teacher"][name]) for name in found["teacher"])
    assert off(found["teacher"], found["student"]) > 1e-4


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "run.accumulate_steps=2" in case.overrides])
def test_micro_batches_of_all_ranks(name: str, folder: Path, alone: Any) -> None:
    assert_same_run(torch.load(folder / f"{name}.pt"), alone("micro_stage2" if "micro_" in name else "all_stage0"))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_all_ranks_skip_the_step_that_is_bad_on_one(stage: int, folder: Path, alone: Any) -> None:
    found = torch.load(folder / f"bad_stage{stage}.pt")
    assert [row["skipped"] for row in rows_of(found)] == [0] * BAD_STEP + [1] * (4 - BAD_STEP)
    assert {int(value) for name, value in found["optimizer"].items() if name.startswith("step/")} == {3}
    expected = alone("bad_stage0")
    assert off(found["student"], expected["student"]) < 1e-5
    assert off(found["teacher"], expected["teacher"]) < 1e-5


@pytest.mark.parametrize("stage", [1, 3])
def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on_exactly(stage: int, folder: Path, alone: Any) -> None:
    found = torch.load(folder / f"resumed_stage{stage}.pt")
    assert [row["step"] for row in rows_of(found)] == [1, 2, 3, 4, 5, 6]
    assert_same_run(found, alone("resumed_stage1"))


def test_a_checkpoint_of_two_ranks_goes_on_alone(folder: Path, tmp_path: Path) -> None:
    made = torch.load(folder / "resumed_stage3.pt")
    config = config_of("resumed_stage3", tmp_path, 1, "run.engine=plain", "deepspeed={}")
    plan = plan_run(config, str(folder / "resumed_stage3"))
    trainer = make_trainer(replace(config, run=replace(config.run, max_steps=7)), plan=plan)
    for part, model in (("student", trainer.student), ("teacher", trainer.teacher)):
        assert all(torch.equal(made[part][name], tensor) for name, tensor in model.state_dict().items())
    state = trainer.optimizer.state_dict()
    assert all(torch.equal(made["optimizer"][name], tensor) for name, tensor in state.items())
    assert trainer.fit().step == 7


OTHERS = [
    *(("bf16", 5e-3), ("fp16", 5e-3), ("clip_stage3", 1e-5)),
    *((name, 1e-5) for name in CASES if name.startswith(("offloaded", "remade"))),
]


@pytest.mark.parametrize(("name", "tolerance"), OTHERS)
def test_other_ways_to_run(name: str, tolerance: float, folder: Path, alone: Any) -> None:
    assert_same_run(torch.load(folder / f"{name}.pt"), alone(name), tolerance)
