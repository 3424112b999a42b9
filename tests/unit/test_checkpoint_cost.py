"""`benchmarks.checkpoint_cost` on a tiny model: both ways are timed only where they leave the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import checkpoint_cost
from benchmarks.checkpoint_cost import Setting
from cosmos_fast.engine import checkpointer
from tests.tiny_run import tiny_config

pytestmark = pytest.mark.slow


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(checkpoint_cost, "get_recipe", lambda _: tiny_config(tmp_path))
    return Setting(steps=2, batch=2, device="cpu", folder=tmp_path)


def test_saves_are_timed_against_none(setting: Setting) -> None:
    alone, saving = checkpoint_cost.measure(setting, "none", "background", repeats=7)
    assert (alone.metric, saving.metric) == ("none_ms/against_background", "background_ms/against_none")
    assert saving.baseline == "no save"
    assert saving.ratio is not None
    assert min(saving.ratio, alone.value, saving.value) > 0
    assert alone.shapes["saved_mib"] == saving.shapes["saved_mib"] > 0.1


@pytest.mark.parametrize("copies", [True, False])
def test_a_save_of_a_later_step_is_found(setting: Setting, monkeypatch: pytest.MonkeyPatch, copies: bool) -> None:
    """Its thread gets the processor only when the window is over; without a copy it then finds other weights."""
    join = checkpointer._Saving.wait

    def wait(saving: checkpointer._Saving) -> None:
        saving._thread.start()
        join(saving)

    monkeypatch.setattr(checkpointer._Saving, "start", lambda _: None)
    monkeypatch.setattr(checkpointer._Saving, "wait", wait)
    monkeypatch.setattr(checkpointer._Saving, "is_writing", True)
    if copies:
        checkpoint_cost.check(setting)
        return
    monkeypatch.setattr(checkpointer, "_copied", dict)
    with pytest.raises(AssertionError, match="student differs"):
        checkpoint_cost.check(setting)
