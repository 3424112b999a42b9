"""Ctrl-C on a run of one process."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cosmos_fast.data.batch import Batch
from cosmos_fast.engine import checkpoint
from cosmos_fast.utils.signals import StopRequest
from tests.tiny_run import make_trainer, tiny_config


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """SIGINT as a terminal's program has it: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("times", "kept"), [(1, ["step_00000003"]), (2, [])])
def test_ctrl_c_saves_and_a_second_one_ends_at_once(times: int, kept: list[str], tmp_path: Path, capfd) -> None:
    def poison(batch: Batch) -> None:
        if batch.position == 8:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    trainer = make_trainer(tiny_config(tmp_path), poison=poison)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert [folder.name for folder in checkpoint.list_checkpoints(trainer.plan.checkpoints)] == kept
    assert capfd.readouterr().err.count("interrupted: finishing the step and saving") == 1
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest(interrupts=True) as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop.requested
