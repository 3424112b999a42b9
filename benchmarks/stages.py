"""Where the time of a piece of Python work goes: functions are replaced, for a while, by ones that watch the clock.

A stage is a few functions. While one of them runs, the time is that stage's, less what other stages take inside it;
what belongs to none is "other", so that the stages sum to the wall time.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib import import_module
from typing import Any
from unittest import mock

OTHER = "other"


class Stages:
    """Seconds by stage, between start() and stop()."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._running = [OTHER]
        self._since_s = 0.0

    def start(self) -> None:
        self._since_s = time.perf_counter()

    def stop(self) -> None:
        self._lap()

    def _lap(self) -> None:
        now_s = time.perf_counter()
        self.seconds[self._running[-1]] += now_s - self._since_s
        self._since_s = now_s

    def watched(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted."""

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            self._lap()
            self._running.append(stage)
            try:
                return function(*arguments, **named)
            finally:
                self._lap()
                self._running.pop()

        return call


@contextmanager
def watching(places: Mapping[str, tuple[str, ...]]) -> Iterator[Stages]:
    """Within, these functions are watched, under whatever name a module of ours has imported them; import none there.

    places: stage -> functions and methods, each "module:name" or "module:Class.name".
    """
    stages = Stages()
    # all are found before any is replaced: a module that is imported in between would keep the replacement
    found = [(stage, *place) for stage, names in places.items() for name in names for place in holders(name)]
    with ExitStack() as stack:
        for stage, holder, attribute in found:
            watched = stages.watched(stage, getattr(holder, attribute))
            stack.enter_context(mock.patch.object(holder, attribute, watched))
        yield stages


def holders(name: str) -> list[tuple[Any, str]]:
    """Where a function is to be replaced: in its class, or in every module of ours that knows it."""
    module_name, _, attribute = name.partition(":")
    module = import_module(module_name)
    if "." in attribute:
        kind, _, attribute = attribute.partition(".")
        return [(getattr(module, kind), attribute)]
    function = getattr(module, attribute)
    ours = [found for key, found in list(sys.modules.items()) if key.startswith(("cosmos_fast.", "benchmarks."))]
    return [(found, key) for found in ours for key, value in list(vars(found).items()) if value is function]
