"""The picture of `bench loader`: where the time of a sample goes, and samples a second. SVG beside the rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of the backend that draws into files

from benchmarks.plots import STYLE
from benchmarks.rows import Row

NAMES = {"original": "original, PIL", "pil": "PIL loader", "dali": "DALI loader"}
STAGE, WALL = "stage_ms/", "wall"
RATES = {"samples_per_s_per_core": "a core", "samples_per_s": "all cores"}


def draw(rows: Sequence[Row], folder: Path) -> Path | None:
    """`loader.svg` in the folder; None where the rows hold nothing to draw."""
    if not any(row.metric.startswith(STAGE) for row in rows):
        return None
    path = folder / "loader.svg"
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(3, 2))
        _stages(left, rows)
        _rates(right, rows)
        first = rows[0]
        figure.suptitle(f"loader, {first.device}, commit {first.commit}", fontsize=9)
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
    return path


def _stages(axes: Any, rows: Sequence[Row]) -> None:
    """Milliseconds of a sample, one bar a side, stage after stage."""
    spent: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.metric.startswith(STAGE):
            _, side, stage = row.metric.split("/", 2)
            spent.setdefault(stage, {})[side] = row.value
    ends = spent.pop(WALL)
    places = {side: number for number, side in enumerate(ends)}
    starts = dict.fromkeys(ends, 0.0)
    colours = plt.get_cmap("tab20")
    for number, (stage, taken) in enumerate(spent.items()):
        there = list(taken)
        axes.barh(
            [places[side] for side in there],
            list(taken.values()),
            left=[starts[side] for side in there],
            color=colours(number),
            label=stage,
        )
        for side in there:
            starts[side] += taken[side]
    axes.set_yticks(list(places.values()), [NAMES.get(side, side) for side in places])
    axes.invert_yaxis()
    axes.set(xlabel="ms a sample, one process", title="stages")
    axes.legend(fontsize=7, ncols=2, loc="lower right")


def _rates(axes: Any, rows: Sequence[Row]) -> None:
    """Samples a second of every side; where the original was measured, beside it."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        metric, _, side = row.metric.partition("/")
        if metric.startswith("original_") and metric.removeprefix("original_") in RATES:
            metric, side = metric.removeprefix("original_"), "original"
        if metric in RATES and side:
            found.setdefault(metric, {})[side] = row.value
    width = 0.8 / max(1, len(found))
    sides = [side for side in NAMES if any(side in values for values in found.values())]
    for number, (metric, values) in enumerate(found.items()):
        places = [place + number * width for place, side in enumerate(sides) if side in values]
        axes.bar(places, [values[side] for side in sides if side in values], width, label=RATES[metric])
    axes.set_xticks(range(len(sides)), [NAMES[side] for side in sides])
    axes.set(ylabel="samples / s", title="rates")
    axes.legend(fontsize=7)
