"""Ctrl-C on a run of one process."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from cosmos_fast.data.batch import Batch
from cosmos_fast.engine import checkpoint
from cosmos_fast.utils.signals import StopRequest
from tests.tiny_run import make_trainer, tiny_config


@pytest.mark.parametrize(("times", "kept"), [(1, ["step_00000003"]), (2, [])])
def test_ctrl_c_saves_and_a_second_one_ends_at_once(times: int, kept: list[str], tmp_path: Path, capfd) -> None:
    before = signal.getsignal(signal.SIGINT)

    def poison(batch: Batch) -> None:
        if batch.position == 8:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    trainer = make_trainer(tiny_config(tmp_path), poison=poison)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert [folder.name for folder in checkpoint.list_checkpoints(trainer.plan.checkpoints)] == kept
    assert capfd.readouterr().err.count("interrupted: finishing the step and saving") == 1
    assert signal.getsignal(signal.SIGINT) == before


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest(interrupts=True) as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, before)
