"""Numbers of benchmarks as lines of a table: which of them are shown, in what words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# task -> key of a metric -> label, unit, digits.
_RECALLS = {f"r{k}": f"R@{k}" for k in (1, 5, 10)}
_RANKS = {"mean_rank": "mean rank", "median_rank": "median rank"}
_WAYS = {"i2t": "image → text", "t2i": "text → image"}
LABELS: Mapping[str, Mapping[str, str]] = {
    "retrieval": {
        f"{way}_{key}": f"{words} {label}"
        for way, words in _WAYS.items()
        for key, label in {**_RECALLS, **_RANKS}.items()
    },
    "classification": {"top1": "top-1", "top5": "top-5", "mean_per_class": "top-1, mean of classes"},
    "segmentation": {"miou": "mIoU", "pixel_accuracy": "pixels right"},
}
# What a training's log and rows keep of a set.
HEADLINES = {
    "retrieval": ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"),
    "classification": ("top1", "top5", "mean_per_class"),
    "segmentation": ("miou",),
}
LOWER_IS_BETTER = "rank"


@dataclass(frozen=True)
class Row:
    """A metric of a set; values: column -> number, None where a column has none."""

    label: str
    values: Mapping[str, float | None]
    lower_is_better: bool

    def best(self) -> set[str]:
        """The columns with the best number as it is printed; none where all are equal or one stands alone."""
        shown = {name: value for name, value in self.values.items() if value is not None and math.isfinite(value)}
        if len(shown) < 2:
            return set()
        found = (min if self.lower_is_better else max)(shown.values())
        best = {name for name, value in shown.items() if spelled(value) == spelled(found)}
        return best if len(best) < len(shown) else set()


def rows(task: str, metrics: Mapping[str, Mapping[str, float]]) -> Iterator[Row]:
    """Of one set; metrics: column -> the numbers of a model."""
    for key, label in LABELS.get(task, {}).items():
        values = {column: found.get(key) for column, found in metrics.items()}
        if any(value is not None for value in values.values()):
            yield Row(label, values, LOWER_IS_BETTER in key)


def spelled(value: float | None) -> str:
    """A number of a table: two digits."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.2f}"
