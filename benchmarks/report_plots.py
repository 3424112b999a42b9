"""Pictures of the benchmark report, each once for light and once for dark pages; two of them as SVG beside the rows."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import plots
from benchmarks.rows import Row
from cosmos_fast.evaluate.report.plots import DPI, WIDTH_IN, Plot, style
from cosmos_fast.evaluate.report.theme import THEMES, Theme

BAR_IN = 0.27  # height of one bar
SWEEP_DPI = 130
LABEL = 42  # characters beside a bar
PHASES = ("data", "teacher", "student", "loss", "backward", "recompute", "optimizer", "communication", "other")
COLOURS = dict(
    zip(
        PHASES,
        ("#8a6b3d", "#12b5b0", "#2f86e0", "#f2a81d", "#4a4fd8", "#9a55d8", "#35b26b", "#e05aa8", "#8b91a3"),
        strict=True,
    )
)
Paint = Callable[[Axes, Theme], None]


@dataclass(frozen=True)
class _Picture:
    """What is painted, and into which frame; inches, and shares of the width."""

    key: str
    title: str
    caption: str
    paint: Paint
    height_in: float
    left: float
    right: float = 0.96
    head_in: float = 0.08

    def figure(self, theme: Theme) -> Figure:
        figure = Figure(figsize=(WIDTH_IN, self.height_in), dpi=DPI)
        top, bottom = 1 - self.head_in / self.height_in, 0.5 / self.height_in
        figure.subplots_adjust(left=self.left, right=self.right, top=top, bottom=bottom)
        self.paint(figure.subplots(), theme)
        return figure

    def plot(self) -> Plot:
        made = {}
        for theme in THEMES:
            with matplotlib.rc_context(style(theme)):
                made[theme.name] = _png(self.figure(theme))
        return Plot(self.key, self.title, self.caption, made)


def draw(results: Sequence[tuple[str, Sequence[Row]]], folder: Path) -> list[Path]:
    """`ratios.svg` and `ledger.svg` of one device beside its rows. The same rows give the same files."""
    made = []
    for picture in _pictures(results):
        path = folder / f"{picture.key}.svg"
        light = {**style(THEMES[0]), "svg.hashsalt": "cosmos-fast", "svg.fonttype": "none", "figure.facecolor": "white"}
        with matplotlib.rc_context(light):
            picture.figure(THEMES[0]).savefig(path, metadata={"Date": None})
        made.append(path)
    return made


def _pictures(results: Sequence[tuple[str, Sequence[Row]]]) -> list[_Picture]:
    rows = [row for _, own in results for row in own]
    return [picture for picture in (_ratios(rows), _ledgers(rows)) if picture is not None]


def of_device(results: Sequence[tuple[str, Sequence[Row]]]) -> list[Plot]:
    """Every picture of one device, (benchmark, rows) given; one without data is left out."""
    sweeps = [_sweep(name, own) for name, own in results if any(row.metric.startswith("ms/") for row in own)]
    return [picture.plot() for picture in _pictures(results)] + sweeps


def _ratios(rows: Sequence[Row]) -> _Picture | None:
    """Every ratio that a bar was set for, beside the bar."""
    chosen = [row for row in rows if row.meets_bar is not None and not row.name.endswith("_sweep")]
    if not chosen:
        return None
    caption = "Share of the baseline's time or memory that is left; the dark mark is the bar, to the left of it is met."
    paint = partial(_paint_ratios, rows=chosen)
    height_in = BAR_IN * len(chosen) + 0.6
    return _Picture("ratios", "Against the baselines", caption, paint, height_in, left=0.46, right=0.92)


def _paint_ratios(axes: Axes, theme: Theme, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        assert row.ratio is not None
        assert row.bar is not None
        axes.barh(place, row.ratio, color=theme.good if row.meets_bar else theme.bad, height=0.62, alpha=0.85)
        axes.plot([row.bar] * 2, [place - 0.42, place + 0.42], color=theme.ink, linewidth=1.8)
        axes.text(1.02, place, f"{row.ratio:.2g}", transform=axes.get_yaxis_transform(), va="center", size=7)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=6.8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.12 * max(max(row.ratio or 0, row.bar or 0) for row in rows))
    axes.set_xlabel("ratio to the baseline")


def _label(row: Row) -> str:
    words = f"{row.name} {row.metric}".replace("_", " ").replace("forward backward", "fwd + bwd")
    against = {"eager port": ""}.get(row.baseline or "", f" / {row.baseline}")
    whole = words + against
    return whole if len(whole) <= LABEL else whole[: LABEL - 1].rstrip() + "…"


def _ledgers(rows: Sequence[Row]) -> _Picture | None:
    """Milliseconds of each phase of a step, both sides of every setting that was profiled."""
    sides: dict[str, dict[str, float]] = {}
    for row in rows:
        for prefix, side in (("eager_phase_ms/", "eager port"), ("phase_ms/", "cosmos-fast")):
            if row.metric.startswith(prefix):
                label = f"{row.name.removeprefix('step_')}, {side}"
                sides.setdefault(label, {})[row.metric.removeprefix(prefix)] = row.value
    if not sides:
        return None
    caption = "Where the time of a step goes, synthetic input; the parts sum to the measured wall time."
    paint, height_in = partial(_paint_ledgers, sides=sides), 0.42 * len(sides) + 1.1
    return _Picture("ledger", "A step by phase", caption, paint, height_in, left=0.27, head_in=0.55)


def _paint_ledgers(axes: Axes, theme: Theme, sides: dict[str, dict[str, float]]) -> None:
    found = [phase for phase in PHASES if any(side.get(phase) for side in sides.values())]
    for place, side in enumerate(sides.values()):
        start = 0.0
        for phase in found:
            length = side.get(phase, 0.0)
            axes.barh(place, length, left=start, color=COLOURS[phase], height=0.66)
            start += length
        axes.annotate(f"{start:,.0f}", (start, place), (4, 0), textcoords="offset points", va="center", size=8)
    for phase in found:
        axes.barh(0, 0, color=COLOURS[phase], label=phase)
    axes.set_yticks(range(len(sides)), list(sides), fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1)
    axes.set_xlabel("ms a step")
    axes.legend(
        frameon=False, fontsize=7.5, labelcolor=theme.ink, ncols=4, loc="lower left", bbox_to_anchor=(-0.25, 1.01)
    )


def _sweep(name: str, rows: Sequence[Row]) -> Plot:
    """Time against size, as it lies beside the rows; one picture serves both themes."""
    with matplotlib.rc_context({**plots.STYLE, "figure.facecolor": "white"}):
        png = _png(plots.time_against_size(rows), dpi=SWEEP_DPI)
    title = f"{name.removesuffix('_sweep').replace('_', ' ')} over its sizes"
    return Plot(
        name,
        title,
        "Every backend that ran here; dotted: what the machine could do at best.",
        {theme.name: png for theme in THEMES},
    )


def _png(figure: Figure, dpi: int = DPI) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
