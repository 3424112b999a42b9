"""What a rank's step spends in collectives, in every run: the losses', DeepSpeed's, the teacher's gather.

A collective ends when the slowest rank has come, so that most of what it takes on the others is waiting for that rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from cosmos_fast.utils.phases import Lane, PhaseClock, no_clock

COLLECTIVES = (
    *("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast"),
    *("all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_to_all", "all_to_all_single", "barrier"),
)
"""Methods of DeepSpeed's backend."""


class CommunicationClock:
    """A phase clock that adds up the communication of steps and hands every phase on.

    Nothing waits for it: on a CPU it reads the wall clock, on CUDA it records events in the stream of begin_step(),
    which are read by take_ms(). There it is the time that this stream stands still in a collective. What is sent in
    another one, as DeepSpeed's overlap_comm does, goes on beside computing and does not count.
    """

    def __init__(self, device: torch.device, inner: PhaseClock = no_clock) -> None:
        self._lane = Lane(device)
        self._inner = inner
        self._depth = 0
        self._spans: list[tuple[Any, Any]] = []
        self._of_steps: list[tuple[Any, Any]] = []

    def __call__(self, phase: str) -> AbstractContextManager[object]:
        """The time inside belongs to `phase`."""
        return self._communication() if phase == "communication" else self._inner(phase)

    def begin_step(self) -> None:
        """What has been sent since the last step, such as a checkpoint's parts, does not count."""
        self._lane.take_current()
        self._spans.clear()

    def end_step(self) -> None:
        """What has been sent since begin_step() counts."""
        self._of_steps += self._spans
        self._spans.clear()

    def take_ms(self) -> float:
        """Milliseconds of the steps since the last call; on CUDA it waits until they are over."""
        spans, self._of_steps = self._of_steps, []
        if spans:
            self._lane.synchronize()
        return sum(self._lane.between_ms(begin, end) for begin, end in spans)

    @contextmanager
    def _communication(self) -> Iterator[None]:
        self._depth += 1
        begin = self._lane.mark() if self._depth == 1 and self._lane.is_current else None
        try:
            with self._inner("communication"):
                yield
        finally:
            self._depth -= 1
            if begin is not None:
                self._spans.append((begin, self._lane.mark()))


def time_collectives(backend: Any, clock: PhaseClock) -> None:
    """Have the collectives of DeepSpeed's backend, one object of the process, told to `clock` from now on."""
    for name in COLLECTIVES:
        plain = getattr(type(backend), name, None)
        if plain is not None:
            setattr(backend, name, partial(_timed, partial(plain, backend), clock))


def _timed(collective: Callable[..., Any], clock: PhaseClock, *arguments: Any, **named: Any) -> Any:
    with clock("communication"):
        work = collective(*arguments, **named)
    return _TimedWork(work, clock) if hasattr(work, "wait") else work


class _TimedWork:
    """A collective under way, whose wait() is told to the clock."""

    def __init__(self, work: Any, clock: PhaseClock) -> None:
        self._work, self._clock = work, clock

    def wait(self, *arguments: Any) -> Any:
        with self._clock("communication"):
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
