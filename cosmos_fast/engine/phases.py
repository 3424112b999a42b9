"""Names of what a training step does, and the clock that may stand beside them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

PHASES = ("data", "teacher", "student", "loss", "backward", "optimizer", "communication")

PhaseClock = Callable[[str], AbstractContextManager[object]]
"""`with clock("teacher"):` around the work of one phase; phases do not nest."""


def no_clock(phase: str) -> AbstractContextManager[object]:
    """Times nothing, costs nothing."""
    assert phase in PHASES, phase
    return nullcontext()
