"""From numbers to the headline table and to the sentences that say, also when it is bad news, what came out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

Metrics = Mapping[str, float]
TEACHER, STUDENT, CLIP, CHANCE = "teacher", "student", "clip", "chance"
LABELS = {TEACHER: "COSMOS teacher", STUDENT: "COSMOS student", CLIP: "plain CLIP", CHANCE: "chance"}


@dataclass(frozen=True)
class Measure:
    """One line of the table. `decides` marks the measures that the sentences weigh; the others are details of them."""

    key: str
    group: str
    label: str
    decides: bool = False
    unit: str = "%"
    lower_is_better: bool = False


MEASURES = (
    Measure("i2t_r1", "Image → text", "R@1", decides=True),
    Measure("i2t_r5", "Image → text", "R@5"),
    Measure("i2t_r10", "Image → text", "R@10"),
    Measure("i2t_median_rank", "Image → text", "median rank", unit="", lower_is_better=True),
    Measure("t2i_r1", "Text → image", "R@1", decides=True),
    Measure("t2i_r5", "Text → image", "R@5"),
    Measure("t2i_r10", "Text → image", "R@10"),
    Measure("t2i_median_rank", "Text → image", "median rank", unit="", lower_is_better=True),
    Measure("shape_top1", "Zero-shot classification", "shape", decides=True),
    Measure("colour_top1", "Zero-shot classification", "colour", decides=True),
    Measure("pair_top1", "Zero-shot classification", "colour + shape", decides=True),
    Measure("pair_top5", "Zero-shot classification", "colour + shape, top 5"),
    Measure("shape_miou", "Zero-shot segmentation", "mIoU of shapes", decides=True),
    Measure("shape_miou_csa", "Zero-shot segmentation", "mIoU of shapes, with CSA", decides=True),
    Measure("colour_miou", "Zero-shot segmentation", "mIoU of colours", decides=True),
    Measure("colour_miou_csa", "Zero-shot segmentation", "mIoU of colours, with CSA", decides=True),
)


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool
    share: float  # of the scale 0-100, for the bar behind the number; 0 where there is none


@dataclass(frozen=True)
class Line:
    group: str
    label: str
    cells: Mapping[str, Cell]


def format_value(measure: Measure, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if measure.unit == "%":
        return f"{value:.1f}" if value >= 1 else f"{value:.2f}"
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def table(results: Mapping[str, Metrics]) -> list[Line]:
    """Lines of the headline table; results: entity -> metrics, `chance` among them. The best model's cell is marked."""
    lines = []
    for measure in MEASURES:
        values = {entity: metrics[measure.key] for entity, metrics in results.items() if measure.key in metrics}
        models = {entity: value for entity, value in values.items() if entity != CHANCE and math.isfinite(value)}
        if not models:
            continue
        best = min(models.values()) if measure.lower_is_better else max(models.values())
        # Best as printed: a star for a difference that nobody can see would claim too much.
        cells = {
            entity: Cell(
                format_value(measure, values.get(entity)),
                best=entity in models and format_value(measure, models[entity]) == format_value(measure, best),
                share=values.get(entity, 0.0) if measure.unit == "%" else 0.0,
            )
            for entity in results
        }
        lines.append(Line(measure.group, measure.label, cells))
    return lines


def margin(measure: Measure, a: float, b: float, samples: int) -> float:
    """Two standard errors of a difference of two shares among `samples`: what a difference must exceed to be believed.

    The two models see the same samples, so that the true error is smaller: the judgement errs towards "too close".
    """
    p = min(max((a + b) / 200, 1 / (2 * samples)), 1 - 1 / (2 * samples))
    return 200 * math.sqrt(2 * p * (1 - p) / samples)


@dataclass(frozen=True)
class Verdict:
    """Measures in which the first model is clearly ahead, clearly behind, or too close to call."""

    ahead: tuple[str, ...]
    behind: tuple[str, ...]
    close: tuple[str, ...]


def compare(first: Metrics, second: Metrics, samples: int) -> Verdict:
    """Weigh the deciding measures of two models evaluated on the same `samples` scenes."""
    places: dict[str, list[str]] = {"ahead": [], "behind": [], "close": []}
    for measure in MEASURES:
        if not measure.decides or measure.key not in first or measure.key not in second:
            continue
        a, b = first[measure.key], second[measure.key]
        limit = margin(measure, a, b, samples)
        place = "close" if abs(a - b) < limit else "ahead" if a > b else "behind"
        name = measure.label if measure.label.startswith("mIoU") else f"{measure.group.lower()} {measure.label}"
        places[place].append(name.replace("zero-shot classification", "classification by"))
    return Verdict(*(tuple(places[place]) for place in ("ahead", "behind", "close")))


def reading(results: Mapping[str, Metrics], samples: int, compute_ratio: float | None) -> str:
    """One honest sentence about the outcome. compute_ratio: training FLOPs of plain CLIP over those of COSMOS."""
    teacher, chance = results[TEACHER], results[CHANCE]
    times = teacher["i2t_r1"] / chance["i2t_r1"]
    opening = (
        f"Among {samples} held-out scenes the COSMOS teacher puts the right caption first for "
        f"{teacher['i2t_r1']:.1f} % of images ({times:.0f}× chance) and the right image first for "
        f"{teacher['t2i_r1']:.1f} % of captions"
    )
    if CLIP not in results:
        return opening + "."
    clip = results[CLIP]
    compute = "" if compute_ratio is None else f" of {_compute_words(compute_ratio)} compute"
    middle = f"; plain CLIP{compute} reaches {clip['i2t_r1']:.1f} % and {clip['t2i_r1']:.1f} %"
    return f"{opening}{middle}: {_verdict_words(compare(teacher, clip, samples))}."


def _compute_words(ratio: float) -> str:
    return "equal" if 0.95 <= ratio <= 1.05 else f"{ratio:.2f}× the"


def _verdict_words(verdict: Verdict) -> str:
    total = len(verdict.ahead) + len(verdict.behind) + len(verdict.close)
    close = f"too close to call in {_names(verdict.close)}" if verdict.close else ""
    if len(verdict.ahead) == total:
        return f"COSMOS is ahead in all {total} measures"
    if len(verdict.behind) == total:
        return f"plain CLIP is ahead in all {total} measures"
    if len(verdict.close) == total:
        return f"the two are too close to call in all {total} measures"
    parts = []
    if len(verdict.behind) > len(verdict.ahead):
        parts.append(f"plain CLIP wins {_names(verdict.behind)}")
        parts += [f"COSMOS wins {_names(verdict.ahead)}"] if verdict.ahead else []
    else:
        parts += [f"COSMOS wins {_names(verdict.ahead)}"] if verdict.ahead else []
        parts += [f"plain CLIP wins {_names(verdict.behind)}"] if verdict.behind else []
    return ", ".join([*parts, *([close] if close else [])])


def _names(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def csa_sentence(results: Mapping[str, Metrics]) -> str | None:
    """What CSA did to each model's segmentation by colour, in points of mIoU."""
    parts = []
    for entity, metrics in results.items():
        if entity != CHANCE and {"colour_miou", "colour_miou_csa"} <= metrics.keys():
            change = round(metrics["colour_miou_csa"] - metrics["colour_miou"], 1)
            parts.append(f"{change or 0.0:+.1f} points for the {LABELS[entity]}")
    if not parts:
        return None
    return f"CSA changes segmentation by colour by {_names(tuple(parts))}.".replace("the plain", "plain").replace(
        "-", "−"
    )
