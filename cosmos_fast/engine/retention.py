"""Which checkpoints a run keeps: the newest, every so many steps, and the best by a number of its evaluations."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from cosmos_fast.engine.checkpoint import list_checkpoints, prune, step_of
from cosmos_fast.engine.metrics import read_rows
from cosmos_fast.utils.logging import get_logger

_log = get_logger(__name__)


@dataclass
class Retention:
    """newest: how many. every_steps: also those whose step is a multiple of it, 0 for none. best: also the one with the
    largest value of this number of the "eval" rows, or, with a minus before the name, the smallest; only a checkpoint
    that was evaluated counts, the later one where two are equal."""

    newest: int
    every_steps: int = 0
    best: str | None = None
    _has_warned: bool = field(default=False, init=False)

    def apply(self, root: Path, metrics_file: Path) -> None:
        """Drop what is not to be kept below `root`."""
        folders = list_checkpoints(root)
        kept = [folder for folder in folders if self.every_steps and step_of(folder) % self.every_steps == 0]
        if self.best is not None:
            values = self._values(metrics_file)
            evaluated = [folder for folder in folders if step_of(folder) in values]
            kept += [max(evaluated, key=lambda folder: (values[step_of(folder)], step_of(folder)))] if evaluated else []
        prune(root, self.newest, kept)

    def _values(self, metrics_file: Path) -> dict[int, float]:
        """What decides, by step; larger is better."""
        assert self.best is not None
        name, sign = self.best.removeprefix("-"), -1.0 if self.best.startswith("-") else 1.0
        rows = [row for row in read_rows(metrics_file) if row["kind"] == "eval"] if metrics_file.is_file() else []
        found = {row["step"]: sign * row[name] for row in rows if isinstance(row.get(name), int | float)}
        if rows and not found and not self._has_warned:
            self._has_warned = True
            known = ", ".join(key for key in rows[-1] if key not in ("step", "kind", "precision"))
            _log.warning("run.keep_best=%s keeps nothing: the evaluations have %s", self.best, known or "no numbers")
        return {step: value for step, value in found.items() if math.isfinite(value)}
