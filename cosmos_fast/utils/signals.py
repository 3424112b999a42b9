"""Stopping on request: the first signal asks, the second one kills."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


_TOLD = b"interrupted: finishing the step and saving; once more to end at once\n"


class StopRequest:
    """Inside `with StopRequest() as stop:`, SIGTERM and SIGUSR1 only set `stop.signal_name`.

    A second signal acts as it would have without this. Outside the main thread, where Python allows no handlers, it
    does nothing. interrupts: SIGINT too, unless it is ignored; the terminal is told. Not for ranks: a launcher that got
    Ctrl-C with them signals them once more.
    """

    def __init__(self, *, interrupts: bool = False) -> None:
        self.signal_name: str | None = None
        self._interrupts = interrupts
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal_name is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self
        takes = self._interrupts and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # as jobs of a script do
        for number in (*STOP_SIGNALS, signal.SIGINT) if takes else STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        forked_child = os.getpid() != self._owner
        if forked_child or self.requested:
            self._restore()
            os.kill(os.getpid(), number)
            return
        self.signal_name = signal.Signals(number).name
        if number == signal.SIGINT:
            os.write(2, _TOLD)  # a logger may be in the middle of a line

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)
