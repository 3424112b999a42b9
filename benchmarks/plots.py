"""Pictures of a sweep's rows: time against size for every backend, and the roofline. Written as SVG beside the rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of the backend that draws into files

from benchmarks.rows import Row

COLOURS = {
    "eager": "#7f7f7f",
    "tiled": "#1f77b4",
    "native": "#9467bd",
    "triton": "#2ca02c",
    "cuda": "#d62728",
    "eager, compiled": "#ff7f0e",
}
# The same rows give the same file: no date, no random identifiers; text stays text.
STYLE = {"svg.hashsalt": "cosmos-fast", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Both pictures of one sweep, `<name>_time.svg` and `<name>_roofline.svg`; returns their paths."""
    timed = [row for row in rows if row.metric.startswith("ms/")]
    if not timed:
        return []
    name = rows[0].name.removesuffix("_sweep")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for kind, picture in (("time", time_against_size), ("roofline", roofline)):
        with plt.rc_context(STYLE):
            figure = picture(rows)
            path = folder / f"{name}_{kind}.svg"
            figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)
        made.append(path)
    return made


def time_against_size(rows: Sequence[Row]) -> Any:
    """Milliseconds of every backend over the size, both logarithmic, and the floor of the machine below them."""
    figure, axes = plt.subplots(figsize=(6, 4))
    timed = [row for row in rows if row.metric.startswith("ms/")]
    for backend in _backends(timed):
        own = [row for row in timed if row.shapes["backend"] == backend]
        axes.plot(
            [row.shapes["size"] for row in own], [row.value for row in own], "o-", color=_colour(backend), label=backend
        )
        graphs = [row for row in rows if row.metric.startswith("graph_ms/") and row.shapes["backend"] == backend]
        if graphs:
            sizes, times = [row.shapes["size"] for row in graphs], [row.value for row in graphs]
            axes.plot(sizes, times, "--", color=_colour(backend), label=f"{backend}, CUDA graph")
    floors = {row.shapes["size"]: row.value * row.floor_pct / 100 for row in timed if row.floor_pct is not None}
    axes.plot(list(floors), list(floors.values()), ":", color="black", label="floor of this machine")
    axes.set(xscale="log", yscale="log", xlabel=str(timed[0].shapes["size_label"]), ylabel="ms", title=_title(rows))
    ticks = sorted(floors)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    return figure


def roofline(rows: Sequence[Row]) -> Any:
    """FLOP/s that count towards the result, over FLOP a byte it needs at least, under what the machine can give."""
    figure, axes = plt.subplots(figsize=(6, 4))
    rates = {row.metric: row.value for row in rows if row.metric in ("matmul rate", "copy rate")}
    peak, bandwidth = 1e12 * rates["matmul rate"], 1e9 * rates["copy rate"]
    timed = [row for row in rows if row.metric.startswith("ms/")]
    intensities = [_number(row, "flops") / _number(row, "bytes") for row in timed]
    low, high = min(*intensities, peak / bandwidth) / 4, max(*intensities, peak / bandwidth) * 4
    roof = [low, peak / bandwidth, high]
    axes.plot(roof, [min(peak, bandwidth * x) for x in roof], color="black", label="matrix product and copy, measured")
    for backend in _backends(timed):
        own = [row for row in timed if row.shapes["backend"] == backend]
        axes.plot(
            [_number(row, "flops") / _number(row, "bytes") for row in own],
            [_number(row, "flops") / (row.value / 1e3) for row in own],
            "o",
            color=_colour(backend),
            label=backend,
        )
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="FLOP / s", title=_title(rows))
    axes.legend(fontsize=8)
    return figure


def _backends(timed: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(str(row.shapes["backend"]) for row in timed))


def _colour(backend: str) -> str:
    return COLOURS.get(backend, "#17becf")


def _number(row: Row, name: str) -> float:
    value = row.shapes[name]
    assert isinstance(value, int | float)
    return float(value)


def _title(rows: Sequence[Row]) -> str:
    first = rows[0]
    return f"{first.shapes['op']}, {first.device}\ncommit {first.commit}, torch {first.versions.get('torch', '?')}"
