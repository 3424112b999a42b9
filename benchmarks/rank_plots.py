"""The picture of `bench ranks`: memory and time of a step by stage and teacher, and the plan's times. SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of the backend that draws into files

from benchmarks.plots import STYLE
from benchmarks.rows import Row

WHAT = {"peak_mib": "MiB, most of any rank", "step_ms": "ms a step", "plan_step_ms": "ms a step, by the plan"}


def draw(rows: Sequence[Row], folder: Path) -> Path:
    """`ranks.svg` in the folder: one panel a number of ranks and quantity."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        metric, _, rest = row.metric.partition("/")
        world, _, case = rest.partition(", ")
        if metric in WHAT and case.startswith("stage"):
            found.setdefault(world, {}).setdefault(metric, {})[case.replace(", teacher", "\n")] = row.value
    path = folder / "ranks.svg"
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(max(1, len(found)), 2, figsize=(9, 3 * max(1, len(found))), squeeze=False)
        for (world, measured), (left, right) in zip(found.items(), grid, strict=True):
            _bars(left, {"peak_mib": measured.get("peak_mib", {})})
            _bars(right, {name: measured.get(name, {}) for name in ("step_ms", "plan_step_ms")})
            left.set(title=f"{world}: peak memory", ylabel="MiB")
            right.set(title=f"{world}: time of a step", ylabel="ms")
            right.legend(fontsize=7)
        figure.suptitle(f"ranks, {rows[0].device}, commit {rows[0].commit}", fontsize=9)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
    return path


def _bars(axes: Any, series: dict[str, dict[str, float]]) -> None:
    """A group a case, a bar a series."""
    cases = list(dict.fromkeys(case for values in series.values() for case in values))
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [place + number * width for place, case in enumerate(cases) if case in values]
        axes.bar(places, [values[case] for case in cases if case in values], width, label=WHAT[name])
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(cases))], cases, fontsize=7)
