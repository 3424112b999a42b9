"""The curves of a report: one small figure a question, drawn once for light and once for dark pages."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cosmos_fast.evaluate.report.runs import Run
from cosmos_fast.evaluate.report.theme import THEMES, Theme

matplotlib.use("Agg")
WIDTH_IN, HEIGHT_IN, DPI = 5.2, 2.9, 170


@dataclass(frozen=True)
class Plot:
    """`png[theme name]` are the bytes; `caption` is one sentence below the picture."""

    key: str
    title: str
    caption: str
    png: dict[str, bytes]


@dataclass(frozen=True)
class Curve:
    """One line: label, entity (which colour), x and y. `dashed` for levels and secondary series."""

    label: str
    entity: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def draw(
    curves: Sequence[Curve], x_label: str, y_label: str, *, zero: bool = True, log: bool = False
) -> dict[str, bytes]:
    """PNG bytes per theme. `zero` starts the y axis at 0."""
    paint = partial(_draw, curves=curves, x_label=x_label, y_label=y_label, zero=zero, log=log)
    return {theme.name: _render(theme, paint) for theme in THEMES}


def _draw(axes: Axes, theme: Theme, curves: Sequence[Curve], x_label: str, y_label: str, zero: bool, log: bool) -> None:
    for curve in curves:
        (line,) = axes.plot(curve.x, curve.y, color=theme.series(curve.entity), label=curve.label, linewidth=2.0)
        if curve.dashed:
            line.set(linestyle=(0, (4, 3)), linewidth=1.3)
        elif len(curve.x) <= 25:
            line.set(marker="o", markersize=3.5)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if log:
        axes.set_yscale("log")
    elif zero:
        axes.set_ylim(bottom=0)
        axes.margins(y=0.08)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=theme.ink, loc="best")


def style(theme: Theme) -> dict[Any, Any]:
    """Matplotlib's settings for a theme."""
    return {
        "font.size": 9,
        "text.color": theme.ink,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.line,
        "axes.facecolor": theme.card,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.line,
        "grid.linewidth": 0.7,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "figure.facecolor": theme.card,
    }


def _render(theme: Theme, paint: Callable[[Axes, Theme], None]) -> bytes:
    with matplotlib.rc_context(style(theme)):
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), dpi=DPI)
        # Fixed margins: a layout engine would draw everything once more to measure it.
        figure.subplots_adjust(left=0.13, right=0.975, top=0.96, bottom=0.16)
        paint(figure.subplots(), theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Centred moving average over `share` of the points, for curves logged every few steps."""
    half = int(len(values) * share / 2)
    return [sum(part) / len(part) for i in range(len(values)) for part in [values[max(0, i - half) : i + half + 1]]]


def flops_scale(total: float) -> tuple[float, str]:
    """Divisor and unit that bring `total` FLOPs to a readable number."""
    for size, unit in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP")):
        if total >= size:
            return size, unit
    return 1e9, "GFLOP"


def training_plots(cosmos: Run, clip: Run | None) -> list[Plot]:
    """Every curve of a report; one without data is left out."""
    runs = [("COSMOS", "teacher", cosmos)] + ([("plain CLIP", "clip", clip)] if clip else [])
    size, unit = flops_scale(max(run.total_flops for _, _, run in runs))

    def over_compute(run: Run, steps: Sequence[int]) -> list[float]:
        return [value / size for value in run.flops_at(steps)]

    plots = [
        *(_retrieval(runs, direction, over_compute, unit) for direction in ("i2t", "t2i")),
        _clip_loss(runs, over_compute, unit),
        _distill_loss(cosmos, over_compute, unit),
        _one_key(runs, "lr", "Learning rate", "learning rate × 1000", "Linear warm-up, then half a cosine to 0.", 1e3),
        _temperatures(cosmos, clip),
        _one_key(
            runs, "samples_per_s", "Throughput", "samples / s", "Images with all their views and captions, per second."
        ),
        _one_key(
            runs, "data_stall_pct", "Waiting for data", "data stall, %", "Share of a step spent waiting for the loader."
        ),
    ]
    return [plot for plot in plots if plot is not None]


Runs = list[tuple[str, str, Run]]
OverCompute = Callable[[Run, Sequence[int]], list[float]]


def _retrieval(runs: Runs, direction: str, over_compute: OverCompute, unit: str) -> Plot | None:
    curves = []
    for label, _, run in runs:
        members = (("teacher", "teacher"), ("student", "student")) if label == "COSMOS" else (("student", "clip"),)
        for weights, entity in members:
            steps, values = run.series(f"{weights}_{direction}_r1", run.evals)
            name = f"{label} {weights}" if label == "COSMOS" else label
            if steps:
                curves.append(Curve(name, entity, over_compute(run, steps), values))
    if not curves:
        return None
    level = runs[0][2].series(f"chance_{direction}_r1", runs[0][2].evals)[1]
    if level:
        end = max(max(curve.x) for curve in curves)
        curves.append(Curve("chance", "chance", [0, end], [level[-1]] * 2, dashed=True))
    title = "Image → text retrieval" if direction == "i2t" else "Text → image retrieval"
    caption = f"R@1 on held-out scenes against training compute, so that equal {unit} stand above each other."
    return Plot(f"retrieval_{direction}", title, caption, draw(curves, f"training compute, {unit}", "R@1, %"))


def _clip_loss(runs: Runs, over_compute: OverCompute, unit: str) -> Plot | None:
    curves = []
    for label, entity, run in runs:
        steps, values = run.series("clip_loss")
        if steps:
            curves.append(Curve(label, entity, over_compute(run, steps), smooth(values)))
    if not curves:
        return None
    end = max(max(curve.x) for curve in curves)
    for label, entity, run in runs:
        batch = run.config.run.batch_size
        curves.append(Curve(f"{label}, guessing: ln {batch}", entity, [0, end], [math.log(batch)] * 2, dashed=True))
    caption = (
        "Contrastive term. COSMOS averages 16 image–caption view pairs, local captions among them; CLIP has one pair."
    )
    return Plot("loss_clip", "CLIP loss", caption, draw(curves, f"training compute, {unit}", "loss, nats"))


def _distill_loss(cosmos: Run, over_compute: OverCompute, unit: str) -> Plot | None:
    steps, values = cosmos.series("distill_loss")
    if not steps:
        return None
    curves = [Curve("COSMOS", "teacher", over_compute(cosmos, steps), smooth(values))]
    caption = "Cross-modal student features against the teacher's features: mean of 64 view pairs."
    png = draw(curves, f"training compute, {unit}", "loss, nats")
    return Plot("loss_distill", "Distillation loss", caption, png)


def _one_key(runs: Runs, key: str, title: str, y_label: str, caption: str, factor: float = 1.0) -> Plot | None:
    curves = []
    for label, entity, run in runs:
        steps, values = run.series(key)
        if steps:
            curves.append(Curve(label, entity, steps, [factor * value for value in values]))
    return Plot(key, title, caption, draw(curves, "optimizer step", y_label)) if curves else None


def _temperatures(cosmos: Run, clip: Run | None) -> Plot | None:
    wanted = [("COSMOS, CLIP loss", "teacher", cosmos, "logit_scale", False)]
    wanted.append(("COSMOS, distillation", "student", cosmos, "distill_logit_scale", False))
    if clip:
        wanted.append(("plain CLIP", "clip", clip, "logit_scale", False))
    curves = []
    for label, entity, run, key, dashed in wanted:
        steps, values = run.series(key)
        if steps:
            curves.append(Curve(label, entity, steps, values, dashed))
    if not curves:
        return None
    caption = "Learnt factors on the cosines (inverse temperatures). They start at 14.3 and are held below 100."
    return Plot("temperatures", "Temperatures", caption, draw(curves, "optimizer step", "logit scale", zero=False))
