"""The loop: gradients, accumulation, precision, NaN, validators, stopping, resuming."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cosmos_fast.config import load_config
from cosmos_fast.data.batch import Batch
from cosmos_fast.engine import checkpoint
from cosmos_fast.engine.metrics import drop_rows_after, read_rows
from cosmos_fast.engine.run_folder import plan_run
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.loss import ClipLoss, CosmosLoss
from cosmos_fast.model import load_checkpoint
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.files import FolderLock
from tests.tiny_run import make_batch, make_trainer, tiny_config


def rows_of(trainer: Trainer, kind: str = "train") -> list[dict]:
    return [row for row in read_rows(trainer.plan.metrics_file) if row["kind"] == kind]


def losses_of(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in rows_of(trainer)]


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


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


@pytest.mark.parametrize("recipe", ["demo", "demo_clip"])
def test_rows_say_what_happened(recipe: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "run.log_every_steps=3", "run.max_steps=7", recipe=recipe)
    trainer = make_trainer(config)
    trainer.flops_per_sample = 1000.0
    trainer.fit()
    rows = rows_of(trainer)
    assert [row["step"] for row in rows] == [1, 3, 6, 7]
    row = rows[-1]
    assert (row["samples_seen"], row["epoch"], row["skipped"], row["flops"]) == (28, 0.7, 0, 28_000)
    assert row["loss"] == pytest.approx(row["clip_loss"] + row["distill_loss"], rel=1e-6)
    assert row["samples_per_s"] == pytest.approx(4e3 / (row["step_ms"] + row["data_ms"]), rel=1e-6)
    assert row["lr"] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 4 / 5)))
    assert 0 <= row["data_stall_pct"] <= 100
    assert ("distill_logit_scale" in row) == (recipe == "demo")
    assert trainer.state.position == 28
    stored = load_checkpoint(trainer.plan.folder, "teacher")
    assert torch.equal(flat(stored), flat(trainer.teacher))
    assert load_config(trainer.plan.folder / "config.yaml") == config
    log = (trainer.plan.folder / "log.txt").read_text()
    assert "step 7/7  loss" in log
    assert "saved" in log


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


def test_one_bad_step_is_skipped_counted_and_forgotten(tmp_path: Path, caplog) -> None:
    def poison(batch: Batch) -> None:
        if batch.position == 8:
            batch.images[0][1] = math.nan

    config = tiny_config(tmp_path)
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
    assert dump["losses"]["loss"] == "nan"
    assert set(dump["gradient_norms"]) == {name for name, _ in trainer.student.named_parameters()}


def test_validators_run_on_time_and_leave_no_trace(tmp_path: Path) -> None:
    seen = []

    def validator(step: int, student: torch.nn.Module, teacher: torch.nn.Module) -> dict[str, float]:
        torch.rand(5)
        seen.append((step, student.training, teacher.training, torch.is_grad_enabled()))
        return {"i2t_r1": float(step), "t2i_r1": math.nan}

    plain = make_trainer(tiny_config(tmp_path, "name=plain", "run.max_steps=5"))
    plain.fit()
    config = tiny_config(tmp_path, "name=watched", "run.max_steps=5", "run.evaluate_every_steps=2")
    watched = make_trainer(config, (validator,))
    watched.fit()
    assert seen == [(2, False, False, False), (4, False, False, False), (5, False, False, False)]
    assert rows_of(watched, "eval")[1] == {"step": 4, "kind": "eval", "i2t_r1": 4.0, "t2i_r1": None}
    assert losses_of(watched) == losses_of(plain)
    assert watched.student.training


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_finishes_the_step_saves_and_stops(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)

    def poison(batch: Batch) -> None:
        if batch.position == 8:
            os.kill(os.getpid(), number)  # arrives while the third step's data is fetched

    trainer = make_trainer(tiny_config(tmp_path), poison=poison)
    state = trainer.fit()
    assert (state.step, trainer.stop.signal_name, trainer.finished) == (3, number.name, False)
    newest = checkpoint.newest_valid(trainer.plan.checkpoints)
    assert newest is not None
    assert newest.name == "step_00000003"
    assert signal.getsignal(number) == before


def test_signal_during_a_save_is_answered_by_a_checkpoint_too(tmp_path: Path, monkeypatch) -> None:
    real_save = checkpoint.save

    def save(root: Path, snapshot: checkpoint.Snapshot, keep: int) -> Path:
        if snapshot.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_save(root, snapshot, keep)

    monkeypatch.setattr(checkpoint, "save", save)
    trainer = make_trainer(tiny_config(tmp_path, "run.checkpoint_every_steps=2"))
    state = trainer.fit()
    assert trainer.checkpointer.saved_step == state.step
    assert state.step < 6


def test_full_disk_stops_with_one_line_and_the_run_can_go_on(tmp_path: Path, monkeypatch) -> None:
    config = tiny_config(tmp_path, "run.checkpoint_every_steps=2")
    real_save_file = checkpoint.save_file

    def save_file(tensors: dict, path: Path, metadata: dict) -> None:
        if "step_00000004" in str(path) and path.stem == "teacher":
            raise OSError(errno.ENOSPC, "No space left on device")
        real_save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", save_file)
        with pytest.raises(UserError, match="make room, then continue with --resume"):
            make_trainer(config).fit()
    plan = plan_run(config, resume="auto")
    assert plan.snapshot is not None
    assert plan.snapshot.state.step == 2
    resumed = make_trainer(config, plan=plan)
    resumed.fit()
    whole = make_trainer(replace(config, name="whole"))
    whole.fit()
    assert losses_of(resumed) == losses_of(whole)  # also: rows of steps 3 and 4 are there once
    assert torch.equal(flat(resumed.student), flat(whole.student))


@pytest.mark.parametrize("extra", [(), ("run.accumulate_steps=2", "ema.schedule=cosine", "optimizer.clip_norm=0.1")])
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(extra: tuple[str, ...], tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "run.max_steps=9", "run.checkpoint_every_steps=2", *extra)
    whole = make_trainer(replace(config, name="whole"))
    whole.fit()

    def poison(batch: Batch) -> None:
        if whole.state.position // 2 <= batch.position:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(config, poison=poison).fit()
    plan = plan_run(config, resume="auto")
    resumed = make_trainer(config, plan=plan)
    assert 0 < resumed.state.step < 9
    resumed.fit()
    timeless = ("step", "loss", "clip_loss", "distill_loss", "lr", "ema_decay", "grad_norm", "epoch", "logit_scale")
    for a, b in zip(rows_of(whole), rows_of(resumed), strict=True):
        assert {key: a[key] for key in timeless} == {key: b[key] for key in timeless}
    for name in ("student", "teacher"):
        assert torch.equal(flat(getattr(whole, name)), flat(getattr(resumed, name)))


def test_existing_run_needs_resume_or_overwrite(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    make_trainer(config).fit()
    with pytest.raises(UserError, match=r"step_00000006: continue with --resume.*--overwrite"):
        plan_run(config)
    with pytest.raises(UserError, match="give one of them"):
        plan_run(config, "auto", overwrite=True)
    keep = tmp_path / "demo" / "notes.txt"
    keep.write_text("mine")
    again = make_trainer(replace(config, seed=1), plan=plan_run(replace(config, seed=1), overwrite=True))
    assert checkpoint.list_checkpoints(again.plan.checkpoints)  # planning and building touch nothing
    again.fit()
    assert len(rows_of(again)) == 6
    assert keep.read_text() == "mine"


def test_resume_from_a_path(tmp_path: Path, caplog) -> None:
    config = tiny_config(tmp_path, "run.checkpoint_every_steps=2", "run.keep_checkpoints=9")
    whole = make_trainer(config)
    whole.fit()
    expected = losses_of(whole)
    early = whole.plan.checkpoints / "step_00000002"
    branch = replace(config, name="branch", optimizer=replace(config.optimizer, lr=0.1))
    with caplog.at_level("WARNING", logger="cosmos_fast"):
        branched = make_trainer(branch, plan=plan_run(branch, str(early)))
    assert "optimizer.lr: 0.001 -> 0.1" in caplog.text
    branched.fit()
    assert [row["step"] for row in rows_of(branched)] == [3, 4, 5, 6]
    again = make_trainer(config, plan=plan_run(config, str(early)))
    again.fit()
    assert losses_of(again) == expected
    assert (whole.plan.checkpoints / "superseded_step_00000004").is_dir()
    with pytest.raises(UserError, match="holds checkpoints of its own"):
        plan_run(branch, str(early))
    with pytest.raises(UserError, match="does not exist"):
        plan_run(config, str(tmp_path / "nowhere"))


def test_resume_with_another_architecture_is_refused(tmp_path: Path) -> None:
    make_trainer(tiny_config(tmp_path)).fit()
    with pytest.raises(UserError, match="another architecture"):
        plan_run(tiny_config(tmp_path, "model.text.layers=3"), "auto")


def test_resume_before_the_first_checkpoint_starts_from_scratch(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    plan = plan_run(config, "auto")
    assert plan.snapshot is None
    trainer = make_trainer(config, plan=plan)
    trainer.fit()
    finished = make_trainer(config, plan=plan_run(config, "auto"))
    assert finished.fit().step == 6  # nothing left to do
    assert len(rows_of(finished)) == 6


def test_two_trainers_cannot_share_a_folder(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_config(tmp_path))
    trainer.plan.folder.mkdir(parents=True)
    child = os.fork()
    if child == 0:  # record locks are per process
        with FolderLock(trainer.plan.folder):
            os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    try:
        with pytest.raises(UserError, match="another process is training"):
            trainer.fit()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    trainer.fit()


def test_tensorboard_gets_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tiny_config(tmp_path, "run.tensorboard=true"))
    trainer.fit()
    events = EventAccumulator(str(trainer.plan.folder / "tensorboard")).Reload()
    written = [event.value for event in events.Scalars("train/loss")]
    assert written == pytest.approx(losses_of(trainer), rel=1e-6)


def test_wandb_run_is_continued_by_a_resumed_one(tmp_path: Path, monkeypatch) -> None:
    started: list[dict] = []
    logged: list[tuple[int, dict]] = []

    class Run:
        def log(self, numbers: dict, step: int) -> None:
            logged.append((step, numbers))

        def finish(self) -> None:
            logged.append((-1, {}))

    def init(**settings: object) -> Run:
        started.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = tiny_config(tmp_path, "run.wandb=true", "run.max_steps=2")
    trainer = make_trainer(config)
    trainer.fit()
    assert [step for step, _ in logged] == [1, 2, -1]
    assert logged[1][1]["train/loss"] == losses_of(trainer)[1]
    make_trainer(config, plan=plan_run(config, "auto")).fit()
    assert started[0]["id"] == started[1]["id"]
    assert started[1]["resume"] == "allow"


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_missing_tracker_is_one_line(package: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        make_trainer(tiny_config(tmp_path, f"run.{package}=true")).fit()


def test_metrics_survive_a_line_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": null}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert read_rows(file) == [{"step": 1, "loss": None}, {"step": 2, "loss": 1.5}]
    drop_rows_after(file, 1)
    assert file.read_text() == '{"step": 1, "loss": null}\n'


def test_clip_objective_sees_every_view(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, recipe="demo_clip")
    trainer = make_trainer(config)
    batch = make_batch(config, 0)
    expected = ClipLoss()(trainer.student(batch.images, batch.texts)).total.item()
    outcome = trainer.train_step([batch])
    assert (float(outcome.loss), float(outcome.distill_loss)) == (pytest.approx(expected), 0.0)
