"""Names of what a training step does, and the clock that may stand beside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

PHASES = ("data", "teacher", "student", "loss", "backward", "recompute", "optimizer", "communication")
OTHER = "other"

PhaseClock = Callable[[str], AbstractContextManager[object]]
"""`with clock("teacher"):` around the work of one phase. Where another begins inside, its time counts there only."""


def no_clock(phase: str) -> AbstractContextManager[object]:
    """Times nothing, costs nothing."""
    assert phase in PHASES, phase
    return nullcontext()


@dataclass(frozen=True)
class Ledger:
    """Milliseconds of an average step by phase: PHASES in order, and "other", which is the rest of `wall_ms`."""

    phase_ms: dict[str, float]
    wall_ms: float
    steps: int

    @classmethod
    def mean_of(cls, ledgers: Sequence[Ledger]) -> Ledger:
        """Of several ranks that have taken the same steps; it sums to its wall time as they do."""
        phases = {phase: sum(one.phase_ms[phase] for one in ledgers) / len(ledgers) for phase in ledgers[0].phase_ms}
        return cls(phases, sum(one.wall_ms for one in ledgers) / len(ledgers), ledgers[0].steps)

    def share_pct(self, phase: str) -> float:
        """Percent of the wall time."""
        return 100.0 * self.phase_ms[phase] / self.wall_ms


class Lane:
    """Where time is read: a CPU's wall clock, or the CUDA stream that was current at take_current().

    A process may work in several streams at a time, and the events of two are in no order.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._stream: Any = None

    @property
    def is_current(self) -> bool:
        """Whether work that begins now goes here; before take_current() only on a CPU."""
        return not self._cuda or (self._stream is not None and torch.cuda.current_stream(self._device) == self._stream)

    def take_current(self) -> None:
        """From now on it is the stream that is current."""
        if self._cuda:
            self._stream = torch.cuda.current_stream(self._device)

    def mark(self) -> Any:
        """This moment, or the one when the stream gets here."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def between_ms(self, begin: Any, end: Any) -> float:
        """From one mark to another; on CUDA after synchronize()."""
        return float(begin.elapsed_time(end)) if self._cuda else 1e3 * float(end - begin)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self._cuda:
            torch.cuda.synchronize(self._device)


class PhaseTimer:
    """A clock that keeps a timeline: every entry to and exit from a phase is a mark, and the time up to the next mark
    belongs to whatever phase is innermost then.

    On a CPU a mark is a reading of the wall clock. On CUDA it is an event in the stream, and nothing waits for it: the
    ledger is then the GPU's timeline, where time that the GPU spends waiting for the host counts to the phase in which
    it waits, and work of the host that the GPU does not wait for does not show. It is the stream of start(): a phase
    that is entered in another one goes on beside it, and counts to the phase around it. Phases also appear as ranges in
    a trace of torch's profiler.
    """

    def __init__(self, device: torch.device) -> None:
        self._lane = Lane(device)
        self._open: list[str] = []
        self._marks: list[tuple[str, Any]] = []
        self._started = 0.0

    def __call__(self, phase: str) -> AbstractContextManager[object]:
        """The time inside belongs to `phase`."""
        assert phase in PHASES, phase
        return self._phase(phase)

    def start(self) -> None:
        """Forget everything and begin to count; between two steps."""
        assert not self._open, f"inside phase {self._open[-1]}"
        self._lane.synchronize()
        self._lane.take_current()
        self._marks.clear()
        self._started = time.perf_counter()
        self._mark(OTHER)

    def stop(self, steps: int) -> Ledger:
        """What went on since start(), divided by `steps`; waits for the device."""
        assert self._marks, "start() first"
        self._mark(OTHER)
        self._lane.synchronize()
        wall_ms = 1e3 * (time.perf_counter() - self._started)
        totals = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if phase != OTHER:
                totals[phase] += self._lane.between_ms(begin, end)
        self._marks.clear()
        totals[OTHER] = wall_ms - sum(totals.values())
        return Ledger({phase: ms / steps for phase, ms in totals.items()}, wall_ms / steps, steps)

    @contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        counts = self._lane.is_current
        if counts:
            self._open.append(phase)
            self._mark(phase)
        try:
            with torch.profiler.record_function(f"phase: {phase}"):
                yield
        finally:
            if counts:
                self._open.pop()
                self._mark(self._open[-1] if self._open else OTHER)

    def _mark(self, phase: str) -> None:
        self._marks.append((phase, self._lane.mark()))
