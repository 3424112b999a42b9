"""Which sample stands at a position: a pure function of (seed, position), without tables.

A position is one global sample number. Sources are interleaved by exact integer shares; every source walks epochs of
its own, each a fresh permutation of its samples. Rank r of W with batch B takes positions p + r*B .. p + r*B + B - 1 of
the global batch at p, so the global batch is the same for every split of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

from cosmos_fast.data import rng

_WORD = (1 << 64) - 1
_ROUNDS = 8


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


@lru_cache(maxsize=64)
def permutation(size: int, seed: int, epoch: int, source: int) -> Permutation:
    """The order of one epoch of one source."""
    numbers = rng.generator(seed, rng.ORDER, epoch=epoch, source=source)
    return Permutation(size, [int(key) for key in numbers.integers(0, 1 << 64, _ROUNDS, dtype="uint64")])


class SampleOrder:
    """position -> Place, for a mixture of sources.

    sizes: samples of each source. weights: how often a sample of the source is seen in an epoch of the mixture, so
    weights of 1 are the concatenation of the sources. The share of source s is sizes[s] * weights[s].
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.sizes = list(sizes)
        self.seed = seed
        shares = [size * Fraction(str(weight)) for size, weight in zip(sizes, weights, strict=True)]
        scale = math.lcm(*(share.denominator for share in shares))
        whole = [int(share * scale) for share in shares]
        divisor = math.gcd(*whole)
        self.shares = [share // divisor for share in whole]
        self._below = [0, *accumulate(self.shares)]  # sum of the shares before each source
        self.samples_per_epoch = max(1, round(sum(shares)))

    def locate(self, position: int) -> Place:
        """The sample at `position`."""
        source, draw = self._draw(position)
        epoch, offset = divmod(draw, self.sizes[source])
        return Place(source, epoch, permutation(self.sizes[source], self.seed, epoch, source)(offset))

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
            middle = (low + high) // 2
            left, both = self._below[middle] - self._below[low], self._below[high] - self._below[low]
            before = (2 * position * left + both) // (2 * both)
            if (2 * (position + 1) * left + both) // (2 * both) > before:
                high, position = middle, before
            else:
                low, position = middle, position - before
        return low, position


def rank_positions(position: int, batch_size: int, rank: int) -> range:
    """Positions of a rank in the global batch that starts at `position`; batch_size is per rank."""
    first = position + rank * batch_size
    return range(first, first + batch_size)
