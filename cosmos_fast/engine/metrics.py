"""One row of numbers a logged step or evaluation, to every sink that is on. metrics.jsonl is always on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.files import write_atomic


class Sink(Protocol):
    """Where rows go."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Take one row; it has at least "step" and "kind" ("train" or "eval")."""

    def close(self) -> None:
        """Flush and release."""


class JsonlSink:
    """metrics.jsonl: one JSON object a line; NaN and Inf become null, so that every line is valid JSON."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append and flush: a row survives the process. UserError where the disk is full."""
        with self._one_line():
            self._file.write(to_json(row) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Force the rows to disk."""
        with self._one_line():
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._file.name} cannot be written ({error}): make room, then continue with --resume"
            ) from None


class Metrics:
    """All sinks of a run."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def write(self, row: Mapping[str, Any]) -> None:
        """Give one row to every sink."""
        for sink in self._sinks:
            sink.write(row)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def to_json(row: Mapping[str, Any]) -> str:
    """One line of valid JSON; numbers that JSON has no notation for become null."""
    return json.dumps({key: _finite(value) for key, value in row.items()}, allow_nan=False)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def drop_rows_after(path: Path, step: int) -> None:
    """Forget rows later than `step`, which a run resumed there will write again."""
    if path.exists():
        kept = [row for row in read_rows(path) if row["step"] <= step]
        write_atomic(path, "".join(to_json(row) + "\n" for row in kept))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
