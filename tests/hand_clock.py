"""A clock that moves when a test tells it to, in place of a module's own."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest


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
