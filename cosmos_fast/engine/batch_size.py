"""The largest batch that fits: peak memory is measured at growing sizes, and a line through the measurements tells
which size to try next. Only a size that has been run counts.

Peak memory is flat while the parameters dominate, and a straight line in the batch once the activations do, so the line
is drawn through the largest size that fits and one of at most half its size: between neighbours it would follow the
noise of the measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

GROWTH = 4  # times the largest size that fits: how far a line is trusted
LARGEST = 2**16
WORTH_A_RUN = 1 / 50  # of the size: a smaller gain ends the search


@dataclass(frozen=True)
class Trial:
    """One size that was run. peak_bytes: None where memory ran out or passed the limit. expected_bytes: by the line
    through earlier trials, None where there was none."""

    batch_size: int
    peak_bytes: int | None
    expected_bytes: int | None = None


@dataclass(frozen=True)
class Line:
    """memory = base + slope x batch, bytes."""

    base: float
    slope: float

    def at(self, batch_size: int) -> int:
        """Bytes that a batch takes."""
        return round(self.base + self.slope * batch_size)

    def largest_within(self, limit_bytes: int) -> int:
        """The largest batch that stays within the limit."""
        return int((limit_bytes - self.base) / self.slope)


def split_of(samples: int, largest: int) -> tuple[int, int]:
    """(batch_size, accumulate_steps) of exactly `samples` a step: the largest batch of at most `largest` samples."""
    batch_size = next(size for size in range(min(samples, largest), 0, -1) if samples % size == 0)
    return batch_size, samples // batch_size


@dataclass
class BatchSizeSearch:
    """measure: batch size -> peak bytes of training steps, None where memory ran out. report: told of every trial."""

    measure: Callable[[int], int | None]
    limit_bytes: int
    report: Callable[[Trial], None] = lambda trial: None
    trials: list[Trial] = field(default_factory=list)

    def run(self) -> int:
        """The largest size that was run and stayed within the limit; 0 if not even one sample does."""
        size: int | None = 1
        while size is not None:
            line = self.line
            peak = self.measure(size)
            fits = peak is not None and peak <= self.limit_bytes
            trial = Trial(size, peak if fits else None, None if line is None else line.at(size))
            self.trials.append(trial)
            self.report(trial)
            size = self._next()
        return self.found

    @property
    def found(self) -> int:
        """The largest size so far that fits."""
        return max((trial.batch_size for trial in self.trials if trial.peak_bytes is not None), default=0)

    @property
    def line(self) -> Line | None:
        """Through the largest size that fits and the largest of at most half its size; None before there are two, or
        where they do not rise."""
        points = sorted((t.batch_size, t.peak_bytes) for t in self.trials if t.peak_bytes is not None)
        if len(points) < 2:
            return None
        largest, largest_peak = points[-1]
        size, peak = next(point for point in reversed(points) if 2 * point[0] <= largest)
        slope = (largest_peak - peak) / (largest - size)
        return Line(peak - slope * size, slope) if slope > 0 else None

    def _next(self) -> int | None:
        """The size to try next, None when the search is over."""
        low = self.found
        if low == 0:
            return None
        high = min((trial.batch_size for trial in self.trials if trial.peak_bytes is None), default=None)
        line = self.line
        expected = LARGEST if line is None else line.largest_within(self.limit_bytes)
        if high is None:
            # The second point lies close to the first: that far, nothing can go wrong yet.
            target = min(expected, 2 if low == 1 else GROWTH * low, LARGEST)
        else:
            target = expected if expected < high else (low + high) // 2
        return target if target - low >= max(1, WORTH_A_RUN * low) else None
