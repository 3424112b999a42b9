"""A run folder as the report needs it: its configuration and the rows of metrics.jsonl."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_fast.config.load import load_config
from cosmos_fast.config.train import TrainConfig
from cosmos_fast.utils.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """`train` and `evals` are the rows of either kind, one a step, in the order of steps."""

    folder: Path
    config: TrainConfig
    train: tuple[Row, ...]
    evals: tuple[Row, ...]

    def series(self, key: str, rows: Sequence[Row] | None = None) -> tuple[list[int], list[float]]:
        """Steps and values of `key` where it is present and finite enough to plot (null is written for NaN)."""
        chosen = [row for row in (self.train if rows is None else rows) if isinstance(row.get(key), (int, float))]
        return [row["step"] for row in chosen], [float(row[key]) for row in chosen]

    def last(self, key: str) -> float | None:
        values = self.series(key)[1]
        return values[-1] if values else None

    def flops_at(self, steps: Sequence[int]) -> list[float]:
        """Cumulative training FLOPs after each of `steps`, linear between logged rows (and from 0 before the first)."""
        known_steps, known_flops = self.series("flops")
        known = [(0, 0.0), *zip(known_steps, known_flops, strict=True)]
        return [_interpolate(known, step) for step in steps]

    @property
    def total_flops(self) -> float:
        return self.last("flops") or 0.0


def _interpolate(known: Sequence[tuple[int, float]], step: int) -> float:
    place = min(max(bisect_right([x for x, _ in known], step), 1), len(known) - 1)
    if len(known) < 2:
        return known[0][1]
    (x0, y0), (x1, y1) = known[place - 1], known[place]
    return y0 + (y1 - y0) * (step - x0) / max(1, x1 - x0)


def read_run(folder: Path) -> Run:
    """Read `config.yaml` and `metrics.jsonl`; a last line cut short by a kill is left out."""
    if not folder.is_dir():
        raise UserError(f"run folder {folder} does not exist: train first, or correct the path")
    config_file, metrics_file = folder / "config.yaml", folder / "metrics.jsonl"
    for file in (config_file, metrics_file):
        if not file.is_file():
            raise UserError(
                f"run folder {folder} has no {file.name}: it is not (or not yet) the folder of a training run"
            )
    rows: dict[tuple[str, int], Row] = {}
    for line in metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            # A resumed run repeats the steps after its checkpoint: the later row of a step replaces the earlier.
            rows[(row["kind"], int(row["step"]))] = row
        except (ValueError, KeyError, TypeError):
            continue
    by_kind = {
        kind: tuple(row for (k, _), row in sorted(rows.items(), key=lambda item: item[0][1]) if k == kind)
        for kind in ("train", "eval")
    }
    if not by_kind["train"]:
        raise UserError(
            f"run folder {folder} has no training rows in metrics.jsonl: train for at least one log interval"
        )
    return Run(folder, load_config(config_file), by_kind["train"], by_kind["eval"])
