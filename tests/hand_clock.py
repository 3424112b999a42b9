"""A clock that moves when a test tells it to, in place of a module's own, and a GPU whose streams go by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch


class HandClock:
    """What a module that imports `time` takes for it: readings are exact, and waiting passes time and takes none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        self.now_s = 1000.0
        stand_in = SimpleNamespace(perf_counter=self, monotonic=self, sleep=self.pass_s)
        for module in modules:
            monkeypatch.setattr(module, "time", stand_in)

    def __call__(self) -> float:
        return self.now_s

    def pass_s(self, length: float) -> None:
        self.now_s += length

    def pass_ms(self, length: float) -> None:
        self.now_s += length / 1e3


class HandStreams:
    """Streams, each a name, and events of torch.cuda. late_ms: how far a stream is behind its host. waits: devices that
    were waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clock: HandClock) -> None:
        self.late_ms = {"main": 0.0}
        self.waits: list[torch.device] = []
        self._clock, self._current = clock, "main"
        monkeypatch.setattr(torch.cuda, "Event", self._event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self._current)
        monkeypatch.setattr(torch.cuda, "synchronize", self.waits.append)

    @contextmanager
    def current(self, stream: str) -> Iterator[None]:
        """As torch.cuda.stream."""
        before, self._current = self._current, stream
        yield
        self._current = before

    def _event(self, *, enable_timing: bool) -> _HandEvent:
        assert enable_timing
        return _HandEvent(self)

    def now_ms(self, stream: str) -> float:
        """When the stream gets to what it is given now."""
        return 1e3 * self._clock.now_s + self.late_ms.get(stream, 0.0)


class _HandEvent:
    def __init__(self, streams: HandStreams) -> None:
        self._streams, self._at_ms = streams, float("nan")

    def record(self, stream: str) -> None:
        self._at_ms = self._streams.now_ms(stream)

    def elapsed_time(self, later: _HandEvent) -> float:
        return later._at_ms - self._at_ms
