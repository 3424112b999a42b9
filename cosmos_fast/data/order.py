"""Which sample stands at a position: a pure function of (seed, position), without tables of samples.

A position is one global sample number. Sources are interleaved by exact integer shares; every source walks epochs of
its own, each a fresh permutation of its samples, or pieces of shards in random order where random access is dear (see
Window). Rank r of W with batch B takes positions p + r*B .. p + r*B + B - 1 of the global batch at p, so the global
batch is the same for every split of it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import numpy as np

from cosmos_fast.data import rng

_WORD = (1 << 64) - 1
_ROUNDS = 8
_EPOCHS_KEPT = 3  # this one, the next one for reading ahead, and one for substitutes


@dataclass(frozen=True)
class Place:
    """The sample at a position: source number, that source's epoch, sample number in the source."""

    source: int
    epoch: int
    sample: int


class Permutation:
    """A keyed permutation of 0..size-1, evaluated one element at a time with no memory.

    A Feistel network on a grid of rows x columns >= size cells: each round adds a hash of one coordinate to the other,
    which can be undone, so it is a permutation of the grid. Following it from a cell of 0..size-1 until it returns
    there (cycle walking; 1 + O(1/sqrt(size)) steps on average) makes it one of 0..size-1.
    """

    def __init__(self, size: int, keys: Sequence[int]) -> None:
        self.size = size
        self.rows = math.isqrt(size - 1) + 1
        self.columns = -(-size // self.rows)
        self.keys = tuple(keys)

    def __call__(self, element: int) -> int:
        """Image of `element`."""
        assert 0 <= element < self.size
        while True:
            element = self._permute_grid(element)
            if element < self.size:
                return element

    def _permute_grid(self, cell: int) -> int:
        row, column = divmod(cell, self.columns)
        for number, key in enumerate(self.keys):
            if number % 2:
                column = (column + _mix(row ^ key)) % self.columns
            else:
                row = (row + _mix(column ^ key)) % self.rows
        return row * self.columns + column


def _mix(x: int) -> int:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit flips every output bit half the time."""
    x = (x + 0x9E3779B97F4A7C15) & _WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)


@lru_cache(maxsize=1024)
def permutation(size: int, seed: int, epoch: int, source: int, piece: int = 0) -> Permutation:
    """The order of one epoch of one source, or of one of its pieces, numbered from 1."""
    numbers = rng.generator(seed, rng.ORDER, item=piece, epoch=epoch, source=source)
    return Permutation(size, [int(key) for key in numbers.integers(0, 1 << 64, _ROUNDS, dtype="uint64")])


class Window:
    """Order of one source for storage where random access is dear: few pieces are open at a time, each read once.

    An epoch lays the pieces (runs of samples that lie together) end to end in random order, the samples inside each in
    random order too, cuts this line into `lanes` stretches of equal length, and takes one sample from each in turn. So
    neighbours in the order come from as many pieces as there are lanes, a lane reads piece after piece, and lanes move
    on to their next pieces at different times. Everything is a function of (seed, epoch, offset); an epoch needs one
    table of its pieces. Ranks that divide the lanes among them (a multiple of the global batch) never share a piece.
    """

    def __init__(self, starts: Sequence[int] | np.ndarray, lanes: int) -> None:
        """starts: first sample of each piece and, last, the number of samples; ascending."""
        self.starts = np.asarray(starts, dtype=np.int64)
        self.size = int(self.starts[-1])
        self.lanes = min(lanes, self.size)
        self._tables: OrderedDict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    @property
    def samples_ahead(self) -> int:
        """How far to look ahead to have a piece when it is wanted, and not long before: half a piece in every lane."""
        return self.lanes * max(1, self.size // (2 * (len(self.starts) - 1)))

    def __call__(self, offset: int, seed: int, epoch: int, source: int) -> int:
        """The sample at `offset` in an epoch."""
        row, lane = divmod(offset, self.lanes)
        length, longer = divmod(self.size, self.lanes)  # the first `longer` lanes hold one more
        turn = lane * length + min(lane, longer) + row
        pieces, ends = self._table(seed, epoch, source)
        slot = int(np.searchsorted(ends, turn, side="right"))
        piece = int(pieces[slot])
        first, size = int(self.starts[piece]), int(self.starts[piece + 1] - self.starts[piece])
        inside = turn - (int(ends[slot]) - size)
        return first + permutation(size, seed, epoch, source, piece + 1)(inside)

    def _table(self, seed: int, epoch: int, source: int) -> tuple[np.ndarray, np.ndarray]:
        """Pieces in the order of an epoch, and where each ends on the line."""
        name = (seed, epoch, source)
        if name not in self._tables:
            numbers = rng.generator(seed, rng.PIECES, epoch=epoch, source=source)
            keys = numbers.integers(0, 1 << 64, len(self.starts) - 1, dtype="uint64")
            pieces = np.argsort(keys, kind="stable")
            self._tables[name] = pieces, np.cumsum(np.diff(self.starts)[pieces])
            if len(self._tables) > _EPOCHS_KEPT:
                self._tables.popitem(last=False)
        return self._tables[name]


class SampleOrder:
    """position -> Place, for a mixture of sources.

    sizes: samples of each source. weights: how often a sample of the source is seen in an epoch of the mixture, so
    weights of 1 are the concatenation of the sources. The share of source s is sizes[s] * weights[s]. windows: for each
    source its Window, or None for a permutation of all its samples.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        windows: Sequence[Window | None] | None = None,
    ) -> None:
        self.sizes = list(sizes)
        self.seed = seed
        shares = [size * Fraction(str(weight)) for size, weight in zip(sizes, weights, strict=True)]
        scale = math.lcm(*(share.denominator for share in shares))
        whole = [int(share * scale) for share in shares]
        divisor = math.gcd(*whole)
        self.shares = [share // divisor for share in whole]
        self._below = [0, *accumulate(self.shares)]  # sum of the shares before each source
        self.samples_per_epoch = max(1, round(sum(shares)))
        self.windows = list(windows or [None] * len(self.sizes))
        assert all(window is None or window.size == size for window, size in zip(self.windows, sizes, strict=True))

    def locate(self, position: int) -> Place:
        """The sample at `position`."""
        source, draw = self._draw(position)
        epoch, offset = divmod(draw, self.sizes[source])
        window = self.windows[source]
        if window is not None:
            return Place(source, epoch, window(offset, self.seed, epoch, source))
        return Place(source, epoch, permutation(self.sizes[source], self.seed, epoch, source)(offset))

    def ahead(self, position: int) -> int:
        """The position whose piece should be fetched when `position` is read; `position` itself without windows."""
        far = 0
        for window, share in zip(self.windows, self.shares, strict=True):
            if window is not None:
                far = max(far, window.samples_ahead * self._below[-1] // share)
        return position + far

    def substitute(self, position: int, attempt: int) -> Place:
        """What stands in for an unusable sample at `position`: attempt 1, 2, ... each draw from the same source."""
        place = self.locate(position)
        numbers = rng.generator(self.seed, rng.SUBSTITUTE, item=position, epoch=attempt)
        return Place(place.source, place.epoch, int(numbers.integers(self.sizes[place.source])))

    def _draw(self, position: int) -> tuple[int, int]:
        """(source, how many draws of that source came before `position`).

        Sources are halved until one is left: of the first n positions of a group, round(n * share of the left half)
        belong to the left half. So every prefix holds each share to within half a sample a halving: one sample for up
        to four sources; and an epoch holds it exactly.
        """
        low, high = 0, len(self.shares)
        while high - low > 1:
            middle, before = self._halve(low, high, position)
            if self._halve(low, high, position + 1)[1] > before:
                high, position = middle, before
            else:
                low, position = middle, position - before
        return low, position

    def draws(self, position: int) -> list[int]:
        """How many of the positions before `position` belong to each source."""
        counts = [0] * len(self.shares)
        groups = [(0, len(self.shares), position)]
        while groups:
            low, high, count = groups.pop()
            if high - low == 1:
                counts[low] = count
            else:
                middle, before = self._halve(low, high, count)
                groups += [(low, middle, before), (middle, high, count - before)]
        return counts

    def _halve(self, low: int, high: int, count: int) -> tuple[int, int]:
        """Of the sources low..high-1: (where the right half begins, how many of their first `count` are the left's)."""
        middle = (low + high) // 2
        left, both = self._below[middle] - self._below[low], self._below[high] - self._below[low]
        return middle, (2 * count * left + both) // (2 * both)


def rank_positions(position: int, batch_size: int, rank: int) -> range:
    """Positions of a rank in the global batch that starts at `position`; batch_size is per rank."""
    first = position + rank * batch_size
    return range(first, first + batch_size)
