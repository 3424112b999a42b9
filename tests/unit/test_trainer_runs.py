"""Stopping, resuming, and who may write into a run folder."""

from __future__ import annotations

import errno
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosmos_fast.data.batch import Batch
from cosmos_fast.engine import checkpoint
from cosmos_fast.engine.hooks import StepOutcome
from cosmos_fast.engine.run_folder import plan_run
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.model import compute
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.files import FolderLock
from tests.tiny_run import FakeLoader, add_noise, flat, losses_of, make_trainer, rows_of, tiny_config

ALL_NEGATIVES = ("run.accumulate_steps=2", "run.negatives=all")


@pytest.mark.parametrize(
    ("number", "extra"),
    [(signal.SIGTERM, ()), (signal.SIGUSR1, ()), (signal.SIGTERM, ("run.batch_size=2", *ALL_NEGATIVES))],
)
def test_signal_finishes_the_step_saves_and_stops(
    number: signal.Signals, extra: tuple[str, ...], tmp_path: Path
) -> None:
    before = signal.getsignal(number)

    def poison(batch: Batch) -> None:
        if batch.position == 8:
            os.kill(os.getpid(), number)  # arrives while the third step's data is fetched

    trainer = make_trainer(tiny_config(tmp_path, *extra), poison=poison)
    state = trainer.fit()
    assert (state.step, trainer.stop.signal_name, trainer.finished) == (3, number.name, False)
    assert state.position == 12
    newest = checkpoint.newest_valid(trainer.plan.checkpoints)
    assert newest is not None
    assert newest.name == "step_00000003"
    assert signal.getsignal(number) == before


def test_signal_after_the_checkpointers_turn_is_answered_one_step_later(tmp_path: Path) -> None:
    class Late:
        def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
            if trainer.state.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(tiny_config(tmp_path))
    trainer.hooks.append(Late())
    assert trainer.fit().step == 3
    assert [folder.name for folder in checkpoint.list_checkpoints(trainer.plan.checkpoints)] == ["step_00000003"]


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
    assert plan.state.step == 2
    resumed = make_trainer(config, plan=plan)
    resumed.fit()
    whole = make_trainer(replace(config, name="whole"))
    whole.fit()
    assert losses_of(resumed) == losses_of(whole)  # also: rows of steps 3 and 4 are there once
    assert torch.equal(flat(resumed.student), flat(whole.student))


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("run.accumulate_steps=2", "ema.schedule=cosine", "optimizer.clip_norm=0.1"),
        (*ALL_NEGATIVES, "run.precision=fp16", "optimizer.clip_norm=0.1", "compute.checkpoint_activations=mlp"),
        (*ALL_NEGATIVES, "run.precision=bf16", "compute.compile=true", "compute.optimizer=torch"),
    ],
)
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(extra: tuple[str, ...], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compute, "COMPILER", "eager")  # inductor takes half a minute for its first kernel
    monkeypatch.setattr(compute, "why_no_compiler", lambda device: None)
    config = tiny_config(tmp_path, "run.max_steps=9", "run.checkpoint_every_steps=2", *extra)
    whole = make_trainer(replace(config, name="whole"), poison=add_noise)
    whole.fit()

    def poison(batch: Batch) -> None:
        add_noise(batch)
        if whole.state.position // 2 <= batch.position:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(config, poison=poison).fit()
    plan = plan_run(config, resume="auto")
    resumed = make_trainer(config, plan=plan, poison=add_noise)
    assert 0 < resumed.state.step < 9
    resumed.fit()
    timeless = ("step", "loss", "clip_loss", "distill_loss", "lr", "ema_decay", "grad_norm", "epoch", "logit_scale")
    for a, b in zip(rows_of(whole), rows_of(resumed), strict=True):
        assert {key: a[key] for key in timeless} == {key: b[key] for key in timeless}
    for name in ("student", "teacher"):
        assert torch.equal(flat(getattr(whole, name)), flat(getattr(resumed, name)))


def test_a_folder_that_safetensors_cannot_open_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"l\\udce4t.*no UTF-8: choose another run.out_dir"):
        plan_run(tiny_config(tmp_path / "l\udce4t"))


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


def test_what_another_run_saved_since_the_start_stays(tmp_path: Path) -> None:
    """A start plans, then opens its data: meanwhile another run may hold the folder, save and end."""
    config = tiny_config(tmp_path, "run.max_steps=2")
    late = plan_run(config)
    trainer = make_trainer(config)
    trainer.fit()
    before = sorted(trainer.plan.checkpoints.iterdir()), trainer.plan.metrics_file.read_bytes()
    for plan in (late, replace(late, overwrite=True)):
        with pytest.raises(UserError, match=r"^another run has changed .*now step_00000002\): start again[^\n]*$"):
            make_trainer(config, plan=plan).fit()
        assert before == (sorted(trainer.plan.checkpoints.iterdir()), trainer.plan.metrics_file.read_bytes())


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


def test_resume_in_other_data_says_so(tmp_path: Path, caplog) -> None:
    config = tiny_config(tmp_path, "run.max_steps=2")
    make_trainer(config).fit()
    for identity, is_said in (("random", False), ("40 samples, 0123", True)):
        plan = plan_run(config, "auto")
        loader = FakeLoader(config, plan.state.position)
        loader.identity = identity
        caplog.clear()
        with caplog.at_level("WARNING", logger="cosmos_fast"):
            trainer = Trainer(config, loader, (), plan=plan)
        assert ("data has changed since the checkpoint (random, now 40 samples, 0123)" in caplog.text) == is_said
        assert trainer.state.data == identity


def test_resume_with_another_architecture_is_refused(tmp_path: Path) -> None:
    make_trainer(tiny_config(tmp_path)).fit()
    with pytest.raises(UserError, match="another architecture"):
        plan_run(tiny_config(tmp_path, "model.text.layers=3"), "auto")


def test_resume_before_the_first_checkpoint_starts_from_scratch(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    plan = plan_run(config, "auto")
    assert plan.checkpoint is None
    trainer = make_trainer(config, plan=plan)
    trainer.fit()
    finished = make_trainer(config, plan=plan_run(config, "auto"))
    assert finished.fit().step == 6  # nothing left to do
    assert len(rows_of(finished)) == 6


@pytest.mark.parametrize("blocked", [".lock", "config.yaml", "log.txt"])
def test_a_run_folder_that_cannot_be_written_is_one_line(blocked: str, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_config(tmp_path))
    (trainer.plan.folder / blocked / "in the way").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run folder .* cannot be written .*set run\.out_dir"):
        trainer.fit()
    assert trainer.state.step == 0
    (trainer.plan.folder / blocked / "in the way").rmdir()
    (trainer.plan.folder / blocked).rmdir()
    assert trainer.fit().step == 6  # the lock was given back


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_rows_that_find_no_room_end_the_run_in_one_line(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_config(tmp_path, "run.log_every_steps=3", "run.checkpoint_every_steps=2"))
    trainer.hooks[0] = FillDisk()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written .*No space left.* continue with --resume"):
        trainer.fit()
    assert checkpoint.newest_valid(trainer.plan.checkpoints) is not None


class FillDisk:
    """From the second step on there is no room for rows."""

    def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
        if trainer.state.step == 2:
            (sink,) = trainer.metrics._sinks
            os.dup2(os.open("/dev/full", os.O_WRONLY), sink._file.fileno())  # type: ignore[attr-defined]


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


def test_data_that_turns_bad_stops_the_run_but_loses_no_step(tmp_path: Path) -> None:
    def poison(batch: Batch) -> None:
        if batch.position == 16:
            raise UserError("too many bad samples")

    config = tiny_config(tmp_path)
    trainer = make_trainer(config, poison=poison)
    with pytest.raises(UserError, match="too many bad samples"):
        trainer.fit()
    assert plan_run(config, "auto").state.step == 4
    assert "UserError: too many bad samples" in (trainer.plan.folder / "log.txt").read_text().splitlines()[-1]


def test_a_second_signal_is_not_caught(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def die(*_: object) -> None:
        raise Killed

    def poison(batch: Batch) -> None:
        if batch.position == 8:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, die)
    try:
        with pytest.raises(Killed):
            make_trainer(tiny_config(tmp_path), poison=poison).fit()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_trains_outside_the_main_thread(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_config(tmp_path))
    thread = threading.Thread(target=trainer.fit)
    thread.start()
    thread.join()
    assert trainer.finished
