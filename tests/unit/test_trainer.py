"""The loop: gradients, accumulation, precision, NaN, validators."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from cosmos_fast.data.batch import Batch
from cosmos_fast.engine import loss_scale
from cosmos_fast.engine.hooks import NonfiniteGuard, StepOutcome
from cosmos_fast.loss import ClipLoss, CosmosLoss
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.ranks import Ranks
from tests.tiny_run import add_noise, flat, losses_of, make_batch, make_trainer, rows_of, tiny_config


@pytest.mark.parametrize("recipe", ["demo", "demo_clip"])
def test_learns_a_repeated_batch(recipe: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "run.max_steps=40", "optimizer.lr=3e-3", recipe=recipe)
    first = make_batch(config, 0)

    def same_again(batch: Batch) -> None:
        for view, image in zip(batch.images, first.images, strict=True):
            view.copy_(image)
        batch.texts.copy_(first.texts)

    trainer = make_trainer(config, poison=same_again)
    trainer.fit()
    losses = losses_of(trainer)
    assert len(losses) == 40
    assert losses[-1] < 0.3 * losses[0]
    assert not torch.equal(flat(trainer.student), flat(trainer.teacher))


def test_accumulation_is_the_mean_over_micro_batches_with_their_own_negatives(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "run.accumulate_steps=3")
    trainer = make_trainer(config)
    twin, teacher = copy.deepcopy(trainer.student), trainer.teacher
    micro_batches = [make_batch(config, position) for position in (0, 4, 8)]
    total = torch.zeros(())
    for batch in micro_batches:
        features = teacher.encode_views(batch.images[:2], batch.texts[:2])
        total = total + CosmosLoss()(twin(batch.images, batch.texts), features).total / 3
    total.backward()
    outcome = trainer.train_step(micro_batches)
    assert float(outcome.loss) == pytest.approx(total.item(), rel=1e-5)
    assert (outcome.samples, trainer.state.position, trainer.state.step) == (12, 12, 1)
    for ours, theirs in zip(trainer.student.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_bf16_keeps_fp32_masters_and_stays_near_fp32(tmp_path: Path) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        trainer = make_trainer(tiny_config(tmp_path, f"run.precision={precision}", f"name={precision}"))
        trainer.fit()
        assert {p.dtype for p in trainer.student.parameters()} == {torch.float32}
        assert {p.dtype for p in trainer.teacher.parameters()} == {torch.float32}
        found[precision] = torch.tensor(losses_of(trainer))
    assert not torch.equal(found["fp32"], found["bf16"])
    torch.testing.assert_close(found["fp32"], found["bf16"], rtol=0.03, atol=0.0)


@pytest.mark.parametrize(
    "extra",
    [
        (),
        # One micro-batch of the third step is bad: with all negatives that is the loss of all of them.
        ("run.batch_size=2", "run.accumulate_steps=2", "run.negatives=all"),
        ("run.batch_size=2", "run.accumulate_steps=2", "run.negatives=all", "run.precision=fp16"),
    ],
)
def test_one_bad_step_is_skipped_counted_and_forgotten(
    extra: tuple[str, ...], tmp_path: Path, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 2.0**8)  # no overflow: every other step is applied

    def poison(batch: Batch) -> None:
        if batch.position == 8:
            batch.images[0][1] = math.nan

    config = tiny_config(tmp_path, *extra)
    trainer = make_trainer(config, poison=poison)
    weights: list[torch.Tensor] = []
    step = trainer.train_step

    def recorded(micro_batches: list[Batch], data_ms: float = 0.0):
        outcome = step(micro_batches, data_ms)
        weights.append(torch.cat([flat(trainer.student), flat(trainer.teacher)]))
        return outcome

    trainer.train_step = recorded  # type: ignore[method-assign]
    with caplog.at_level("WARNING", logger="cosmos_fast"):
        trainer.fit()
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert bool(torch.isfinite(weights[-1]).all())
    rows = rows_of(trainer)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert rows[2]["loss"] is None  # valid JSON
    assert "step not applied (1 in a row, 1 in all)" in caplog.text


def test_too_many_bad_steps_stop_with_a_dump(tmp_path: Path) -> None:
    def poison(batch: Batch) -> None:
        if batch.position >= 8:
            batch.images[0][1] = math.inf

    trainer = make_trainer(tiny_config(tmp_path, "run.max_nonfinite_steps=3", "run.max_steps=20"), poison=poison)
    with pytest.raises(UserError, match="3 steps in a row"):
        trainer.fit()
    assert trainer.state.step == 5
    dump = json.loads((trainer.plan.folder / "nonfinite_step_00000005.json").read_text())
    assert dump["step"] == 5
    assert dump["keys"] == ["sample16", "sample17", "sample18", "sample19"]
    assert dump["ranks"] == [0, 0, 0, 0]
    assert dump["losses"]["loss"] == "nan"
    assert set(dump["gradient_norms"]) == {name for name, _ in trainer.student.named_parameters()}


def test_a_dump_has_the_samples_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bad one may be any rank's."""
    trainer = make_trainer(tiny_config(tmp_path))
    trainer.fit()
    told = StepOutcome(**dict.fromkeys((one.name for one in fields(StepOutcome)), math.nan))
    told = replace(told, applied=False, overflow=False, keys=["a", "b"])
    trainer.state.nonfinite_in_a_row = 1
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, ["c"]])
    with pytest.raises(UserError, match="1 steps in a row"):
        NonfiniteGuard(1).after_step(trainer, told)
    dump = json.loads((trainer.plan.folder / "nonfinite_step_00000006.json").read_text())
    assert (dump["keys"], dump["ranks"]) == (["a", "b", "c"], [0, 0, 1])


def test_validators_run_on_time_and_leave_no_trace(tmp_path: Path) -> None:
    seen = []

    def validator(step: int, student: torch.nn.Module, teacher: torch.nn.Module) -> dict[str, float]:
        torch.rand(5)
        seen.append((step, student.training, teacher.training, torch.is_grad_enabled()))
        return {"i2t_r1": float(step), "t2i_r1": math.nan}

    plain = make_trainer(tiny_config(tmp_path, "name=plain", "run.max_steps=5"), poison=add_noise)
    plain.fit()
    config = tiny_config(tmp_path, "name=watched", "run.max_steps=5", "run.evaluate_every_steps=2")
    watched = make_trainer(config, (validator,), poison=add_noise)
    watched.fit()
    assert seen == [(2, False, False, False), (4, False, False, False), (5, False, False, False)]
    assert rows_of(watched, "eval")[1] == {"step": 4, "kind": "eval", "i2t_r1": 4.0, "t2i_r1": None}
    assert losses_of(watched) == losses_of(plain)
    assert watched.student.training


def test_clip_objective_sees_every_view(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, recipe="demo_clip")
    trainer = make_trainer(config)
    batch = make_batch(config, 0)
    expected = ClipLoss()(trainer.student(batch.images, batch.texts)).total.item()
    outcome = trainer.train_step([batch])
    assert (float(outcome.loss), float(outcome.distill_loss)) == (pytest.approx(expected), 0.0)
