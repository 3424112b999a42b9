"""A run that is continued on another number of ranks: its checkpoint tells how many samples a step took."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosmos_fast.engine.run_folder import note_batch, plan_run
from cosmos_fast.engine.state import TrainState
from cosmos_fast.utils.ranks import Ranks
from tests.tiny_run import make_trainer, tiny_config


@pytest.mark.parametrize(
    ("ranks", "settings", "said"),
    [
        (1, ("run.batch_size=8",), ""),
        (4, ("run.batch_size=2",), ""),
        (1, (), "samples a step: 8 -> 4, samples in a loss: 8 -> 4"),
        (2, ("run.batch_size=3",), "samples a step: 8 -> 6, samples in a loss: 8 -> 6"),
        (1, ("run.accumulate_steps=2",), "same: samples in a loss: 8 -> 4"),
        (2, ("run.batch_size=2", "run.accumulate_steps=2", "run.negatives=all"), "run.negatives: micro -> all"),
    ],
)
def test_resume_on_other_ranks_compares_what_a_step_takes(
    ranks: int, settings: tuple[str, ...], said: str, tmp_path: Path, caplog
) -> None:
    config = tiny_config(tmp_path, "run.max_steps=1")
    trainer = make_trainer(config)
    trainer.fit()
    note_batch(trainer.state, config.run, Ranks(0, 2))
    trainer.checkpointer.save(trainer)
    caplog.clear()
    with caplog.at_level("WARNING", logger="cosmos_fast"):
        changed = tiny_config(tmp_path, "run.max_steps=1", *settings)
        plan = plan_run(changed, "auto")
        note_batch(plan.state, changed.run, Ranks(0, ranks))
    warnings = [text for text in caplog.messages if "since the checkpoint" in text]
    assert len(warnings) == bool(said)
    assert all(said in message for message in warnings)


def test_a_checkpoint_from_before_step_samples_tells_what_its_settings_do(tmp_path: Path, caplog) -> None:
    trainer = make_trainer(tiny_config(tmp_path, "run.max_steps=1"))
    trainer.fit()
    assert (trainer.state.step_samples, trainer.state.loss_samples) == (4, 4)
    trainer.state.step_samples = trainer.state.loss_samples = None
    trainer.checkpointer.save(trainer)
    with caplog.at_level("WARNING", logger="cosmos_fast"):
        changed = tiny_config(tmp_path, "run.max_steps=1", "run.batch_size=8")
        make_trainer(changed, plan=plan_run(changed, "auto"))
    assert caplog.text.count("since the checkpoint") == caplog.text.count("run.batch_size: 4 -> 8") == 1
    stored = trainer.state.to_json()
    del stored["step_samples"], stored["loss_samples"]
    assert TrainState.from_json(stored) == trainer.state
