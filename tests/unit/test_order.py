"""The order of samples: permutations, mixtures and the split over ranks, as pure functions of the position."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from cosmos_fast.data.order import Permutation, SampleOrder, permutation, rank_positions


@pytest.mark.parametrize("size", [*range(1, 66), 100, 255, 256, 257, 1000, 9973])
def test_permutation_reaches_every_element_once(size: int) -> None:
    for epoch in range(3):
        order = permutation(size, 7, epoch, 0)
        assert sorted(order(i) for i in range(size)) == list(range(size))


def test_every_network_on_a_small_grid_is_a_permutation() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = int(rng.integers(1, 40))
        order = Permutation(size, [int(k) for k in rng.integers(0, 2**63, 8)])
        assert sorted(map(order, range(size))) == list(range(size))


def test_permutation_spreads_evenly() -> None:
    """Where an element lands, and where its neighbour lands from there, is uniform over 4,000 epochs."""
    size, epochs = 10, 4000
    landed = np.zeros((size, size))
    apart = np.zeros(size)
    for epoch in range(epochs):
        order = permutation(size, 0, epoch, 0)
        image = [order(i) for i in range(size)]
        landed[np.arange(size), image] += 1
        apart[(image[1] - image[0]) % size] += 1
    expected = epochs / size
    chi_square = ((landed - expected) ** 2 / expected).sum()
    assert chi_square < 81 + 4 * np.sqrt(2 * 81)  # 81 degrees of freedom, 4 sigma
    assert apart[0] == 0
    expected = epochs / (size - 1)
    assert ((apart[1:] - expected) ** 2 / expected).sum() < 8 + 5 * 4


def test_seeds_epochs_and_sources_give_other_orders() -> None:
    orders = {
        (seed, epoch, source): tuple(permutation(50, seed, epoch, source)(i) for i in range(50))
        for seed in (0, 1, 2**63)
        for epoch in (0, 1)
        for source in (0, 1)
    }
    assert len(set(orders.values())) == len(orders)
    assert tuple(permutation(50, 1, 0, 0)(i) for i in range(50)) == orders[1, 0, 0]


def test_large_sets_cost_nothing_to_start() -> None:
    tracemalloc.start()
    try:
        order = SampleOrder([27_000_000], [1.0], seed=3)
        places = [order.locate(position).sample for position in range(27_000_000 - 500, 27_000_000)]
        assert tracemalloc.get_traced_memory()[1] < 1 << 20  # a table of this epoch would take a hundred times that
    finally:
        tracemalloc.stop()
    assert len(set(places)) == 500
    assert all(0 <= sample < 27_000_000 for sample in places)


def test_one_source_is_walked_epoch_by_epoch() -> None:
    order = SampleOrder([13], [1.0], seed=1)
    places = [order.locate(position) for position in range(39)]
    assert [place.epoch for place in places] == [0] * 13 + [1] * 13 + [2] * 13
    for epoch in range(3):
        assert sorted(place.sample for place in places if place.epoch == epoch) == list(range(13))
    assert order.samples_per_epoch == 13


def test_mixture_with_weights_of_one_is_the_concatenation() -> None:
    order = SampleOrder([30, 7, 13], [1.0, 1.0, 1.0], seed=5)
    assert order.samples_per_epoch == 50
    for epoch in range(2):
        places = [order.locate(position) for position in range(50 * epoch, 50 * (epoch + 1))]
        seen = Counter((place.source, place.sample) for place in places)
        assert set(seen.values()) == {1}
        assert len(seen) == 50
        assert {place.epoch for place in places} == {epoch}


def test_weights_are_how_often_a_sample_is_seen() -> None:
    order = SampleOrder([40, 10], [1.0, 2.5], seed=5)
    assert order.samples_per_epoch == 65
    seen = Counter(order.locate(position).source for position in range(65 * 4))
    assert seen == {0: 160, 1: 100}
    second = Counter(place.sample for place in map(order.locate, range(65 * 4)) if place.source == 1)
    assert set(second.values()) == {10}  # 4 epochs x 2.5


@pytest.mark.parametrize("sizes", [[40, 10], [100, 3], [17, 29, 5], [1000, 1, 500], [9, 1, 70, 4], [8, 8, 8, 8, 8]])
@pytest.mark.parametrize("weights", [[1.0] * 5, [0.3, 2.0, 0.7, 1.5, 5.0]])
def test_every_prefix_holds_the_shares(sizes: list[int], weights: list[float]) -> None:
    weights = weights[: len(sizes)]
    order = SampleOrder(sizes, weights, seed=0)
    shares = np.array(sizes) * np.array(weights)
    shares = shares / shares.sum()
    count = np.zeros(len(sizes))
    tolerance = 1.0 if len(sizes) <= 4 else 1.5
    for position in range(3000):
        source, draw = order._draw(position)
        assert draw == count[source]  # draws of a source are numbered without gaps: no sample is lost or repeated
        count[source] += 1
        assert np.abs(count - (position + 1) * shares).max() < tolerance + 1e-9


@pytest.mark.parametrize(("world", "batch"), [(1, 24), (2, 12), (4, 6), (8, 3), (24, 1)])
def test_ranks_split_the_same_global_batch(world: int, batch: int) -> None:
    for position in (0, 24, 17):
        together = [p for rank in range(world) for p in rank_positions(position, batch, rank)]
        assert together == list(range(position, position + 24))


def test_substitutes_are_pure_and_differ_by_attempt() -> None:
    order, again = (SampleOrder([500, 300], [1.0, 1.0], seed=9) for _ in range(2))
    for position in (0, 3, 12345):
        places = [order.substitute(position, attempt) for attempt in range(1, 20)]
        assert places == [again.substitute(position, attempt) for attempt in range(1, 20)]
        assert {place.source for place in places} == {order.locate(position).source}
        assert len({place.sample for place in places}) > 15
