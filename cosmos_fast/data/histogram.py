"""Distributions of whole numbers in a few bins, for text and pages alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_BAR_WIDTH = 32


@dataclass(frozen=True)
class Bin:
    """label: the numbers in it, such as 12 or 10-19. length: of its bar, the longest is 1."""

    label: str
    count: int
    share_pct: float
    length: float


@dataclass(frozen=True)
class Histogram:
    """summary: range, median and mean in words. bins: of equal width, empty ones included; one if all are equal."""

    title: str
    summary: str
    bins: list[Bin]

    def lines(self) -> list[str]:
        """As text, a bar a bin."""
        lines = [f"  {self.title}: {self.summary}"]
        if len(self.bins) == 1:
            return lines
        bars = ["█" * round(_BAR_WIDTH * each.length) for each in self.bins]
        return lines + [
            f"    {each.label:>9} {bar:<{_BAR_WIDTH}} {each.count:,} ({each.share_pct:.1f} %)"
            for each, bar in zip(self.bins, bars, strict=True)
        ]


def histogram(title: str, values: Sequence[int], bins: int = 10) -> Histogram | None:
    """Up to `bins` bins over the whole range; None without values."""
    if not values:
        return None
    low, high = min(values), max(values)
    summary = f"{low} to {high}, median {sorted(values)[len(values) // 2]}, mean {sum(values) / len(values):.1f}"
    step = -(-(high - low + 1) // bins)
    counts = Counter((value - low) // step for value in values)
    highest = max(counts.values())
    found = []
    for number in range((high - low) // step + 1):
        first, count = low + number * step, counts[number]
        label = f"{first}" if step == 1 else f"{first}-{first + step - 1}"
        found.append(Bin(label, count, 100 * count / len(values), count / highest))
    return Histogram(title, summary, found)
