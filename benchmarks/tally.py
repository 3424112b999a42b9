"""A pytest plugin that writes down what became of each test as it ends: a run that is killed has told what it had.

    COSMOS_TALLY=/tmp/tally.jsonl python -m pytest -p benchmarks.tally tests/kernels

One line a test: {"test": "tests/kernels/test_x.py::test_y[3]", "outcome": "passed", "failed" or "skipped", "s": 0.3};
the last line, {"finished": true}, is missing where the run did not come to its end. COSMOS_TALLY_FIRST=2 runs the
first two tests of what was chosen only. `read` counts by module.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Counts = dict[str, int]


class Tally:
    """Appends to the file; lines are flushed one by one."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - open as long as pytest runs

    def _line(self, **values: object) -> None:
        self._file.write(json.dumps(values) + "\n")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":  # set-up and tear-down tell failures and skips only
            self._line(test=report.nodeid, outcome=report.outcome, s=round(report.duration, 2))

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._line(test=report.nodeid, outcome="failed", s=0)

    def pytest_sessionfinish(self) -> None:
        self._line(finished=True)


def pytest_configure(config: Any) -> None:
    path = os.environ.get("COSMOS_TALLY")
    if path and not hasattr(config, "workerinput"):  # of xdist's processes only the first one writes
        config.pluginmanager.register(Tally(path))


def pytest_collection_modifyitems(items: list[Any]) -> None:
    first = os.environ.get("COSMOS_TALLY_FIRST")
    if first:
        del items[int(first) :]


def read(paths: Iterable[Path]) -> dict[str, Counts]:
    """Of each test module how many tests passed, failed, were skipped; "unfinished" is 1 where its run was cut off.

    A file a module: {"test_x": {"passed": 3, "failed": 0, "skipped": 1, "unfinished": 0}}.
    """
    found: dict[str, Counts] = {}
    for path in paths:
        worst: dict[str, str] = {}
        finished = False
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                told = json.loads(line)
            except ValueError:  # cut off within a line
                continue
            finished |= "finished" in told
            if "test" in told and worst.get(told["test"]) != "failed":
                worst[told["test"]] = told["outcome"]
        for test, outcome in worst.items():
            module = Path(test.split("::")[0]).stem
            counts = found.setdefault(module, {"passed": 0, "failed": 0, "skipped": 0, "unfinished": int(not finished)})
            counts[outcome] += 1
    return found
