"""The drawn augmentation numbers: distributions as published, and purity."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from cosmos_fast.config import CropConfig, ViewsConfig
from cosmos_fast.data import rng
from cosmos_fast.data.augment import ViewNumbers, draw_views

N = 6000
LOW, HIGH = math.log(3 / 4), math.log(4 / 3)


@pytest.fixture(scope="module")
def drawn() -> list[list[ViewNumbers]]:
    """The eight views of N samples with the published settings, from a square image large enough not to round."""
    crops = ViewsConfig().crops(224)
    return [draw_views(crops, 4000, 4000, rng.generator(1, rng.CROPS, item=i)) for i in range(N)]


def distance_to_uniform(values: list[float], low: float, high: float) -> float:
    """Kolmogorov-Smirnov statistic times sqrt(n); above 1.95 once in a thousand draws."""
    ordered = (np.sort(np.array(values)) - low) / (high - low)
    assert ordered[0] > -5e-3  # boxes are whole pixels
    assert ordered[-1] < 1 + 5e-3
    steps = np.arange(1, len(ordered) + 1) / len(ordered)
    return float(np.abs(steps - ordered).max() * math.sqrt(len(ordered)))


def share_of(flags: list[bool]) -> tuple[float, float]:
    return sum(flags) / len(flags), 4 * math.sqrt(0.25 / len(flags))


def area(view: ViewNumbers) -> float:
    left, top, right, bottom = view.box
    return (right - left) * (bottom - top) / 4000**2


def log_ratio(view: ViewNumbers) -> float:
    left, top, right, bottom = view.box
    return math.log((right - left) / (bottom - top))


def test_local_crops_cover_a_uniform_share_at_a_log_uniform_ratio(drawn: list[list[ViewNumbers]]) -> None:
    # up to 0.4 of a square fits at every ratio, so no try is rejected
    for view in (2, 7):
        assert distance_to_uniform([area(views[view]) for views in drawn], 0.05, 0.4) < 1.95
        assert distance_to_uniform([log_ratio(views[view]) for views in drawn], LOW, HIGH) < 1.95


def test_global_crops_are_those_of_rejection_sampling(drawn: list[list[ViewNumbers]]) -> None:
    numbers = np.random.default_rng(0)
    shares = numbers.uniform(0.4, 1.0, 400_000)
    ratios = np.exp(numbers.uniform(LOW, HIGH, 400_000))
    fits = (shares * ratios <= 1) & (shares / ratios <= 1)
    reference = np.sort(shares[fits])
    for view in (0, 1):
        ours = np.sort([area(views[view]) for views in drawn])
        steps = np.searchsorted(reference, ours, side="right") / len(reference)
        assert np.abs(steps - np.arange(1, N + 1) / N).max() * math.sqrt(N) < 1.95
        assert ours[0] > 0.4 - 1e-3
        assert ours[-1] <= 1


def test_crops_lie_anywhere_inside(drawn: list[list[ViewNumbers]]) -> None:
    for view in (0, 4):
        boxes = np.array([views[view].box for views in drawn])
        assert boxes.min() >= 0
        assert boxes.max() <= 4000
        width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        assert distance_to_uniform(list(boxes[:, 0] / np.maximum(1, 4000 - width)), 0, 1) < 1.95
        assert distance_to_uniform(list(boxes[:, 1] / np.maximum(1, 4000 - height)), 0, 1) < 1.95


@pytest.mark.parametrize("view", range(8))
def test_probabilities_of_each_view(drawn: list[list[ViewNumbers]], view: int) -> None:
    mine = [views[view] for views in drawn]
    blur = (1.0, 0.1, 0.5)[min(view, 2)]
    expected = {
        0.5: [v.flip for v in mine],
        0.8: [bool(v.jitter) for v in mine],
        0.2: [v.gray for v in mine],
    }
    for probability, flags in expected.items():
        share, tolerance = share_of(flags)
        assert abs(share - probability) < tolerance
    share, tolerance = share_of([v.blur_radius > 0 for v in mine])
    assert share == 1 if blur == 1 else abs(share - blur) < tolerance
    share, tolerance = share_of([v.solarize_threshold == 128 for v in mine])
    assert abs(share - 0.2) < tolerance if view == 1 else share == 0
    assert {v.size for v in mine} == {224 if view < 2 else 96}


def test_ranges_of_jitter_and_blur(drawn: list[list[ViewNumbers]]) -> None:
    mine = [views[0] for views in drawn]
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for operation, (low, high) in ranges.items():
        amounts = [dict(view.jitter)[operation] for view in mine if view.jitter]
        assert distance_to_uniform(amounts, low, high) < 1.95
    assert distance_to_uniform([view.blur_radius for view in mine], 0.1, 2.0) < 1.95


def test_jitter_comes_in_every_order_alike(drawn: list[list[ViewNumbers]]) -> None:
    orders = Counter(tuple(name for name, _ in views[3].jitter) for views in drawn if views[3].jitter)
    expected = sum(orders.values()) / 24
    assert len(orders) == 24
    assert sum((count - expected) ** 2 / expected for count in orders.values()) < 23 + 4 * math.sqrt(2 * 23)


def test_decisions_are_independent_of_each_other_and_between_views(drawn: list[list[ViewNumbers]]) -> None:
    columns = []
    for view in (0, 2, 3):
        mine = [views[view] for views in drawn]
        columns += [[v.flip for v in mine], [bool(v.jitter) for v in mine], [v.gray for v in mine]]
        columns += [[area(v) for v in mine], [v.box[0] / 4000 - area(v) for v in mine]]
    correlation = np.corrcoef(np.array(columns, dtype=float))
    np.fill_diagonal(correlation, 0)
    for block in range(0, 15, 5):  # where a crop lies does depend on how large it is
        correlation[block + 3, block + 4] = correlation[block + 4, block + 3] = 0
    assert np.abs(correlation).max() < 5 / math.sqrt(N)


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (1, 1), (1, 300), (2, 3), (500, 375)])
def test_any_image_gives_a_box_inside_it(width: int, height: int) -> None:
    for item in range(200):
        for view in draw_views(ViewsConfig().crops(224), width, height, rng.generator(0, rng.CROPS, item=item)):
            left, top, right, bottom = view.box
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height


def test_fallback_is_the_central_crop_at_the_nearest_ratio() -> None:
    crop = ViewsConfig(global_scale=(0.9, 1.0)).crops(224)[0]
    boxes = {draw_views([crop], 1000, 30, rng.generator(0, rng.CROPS, item=i))[0].box for i in range(50)}
    assert boxes == {(480, 0, 520, 30)}
    boxes = {draw_views([crop], 30, 1000, rng.generator(0, rng.CROPS, item=i))[0].box for i in range(50)}
    assert boxes == {(0, 480, 30, 520)}


def test_settings_off_mean_nothing_happens() -> None:
    quiet = CropConfig(
        size=8,
        scale=(1.0, 1.0),
        flip_p=0,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_p=0,
        gray_p=0,
        blur_p=0,
        blur_radius=(0.1, 2),
        solarize_p=0,
        solarize_threshold=128,
    )
    for item in range(100):
        view = draw_views([quiet], 64, 64, rng.generator(0, rng.CROPS, item=item))[0]
        assert (view.flip, view.jitter, view.gray, view.blur_radius, view.solarize_threshold) == (
            False,
            (),
            False,
            0,
            None,
        )
    strengths = ViewsConfig(jitter=(0.4, 0.0, 0.0, 0.1), jitter_p=1.0).crops(8)[0]
    view = draw_views([strengths], 64, 64, rng.generator(0, rng.CROPS))[0]
    assert {name for name, _ in view.jitter} == {"brightness", "hue"}


def test_numbers_are_pure_and_views_do_not_disturb_each_other() -> None:
    crops = ViewsConfig().crops(224)
    first = draw_views(crops, 500, 375, rng.generator(5, rng.CROPS, item=3, epoch=2, source=1))
    assert first == draw_views(crops, 500, 375, rng.generator(5, rng.CROPS, item=3, epoch=2, source=1))
    other = ViewsConfig(jitter_p=0.0, global_blur_p=(0.0,)).crops(224)
    changed = draw_views(other, 500, 375, rng.generator(5, rng.CROPS, item=3, epoch=2, source=1))
    assert [view.box for view in changed] == [view.box for view in first]
    assert [view.flip for view in changed] == [view.flip for view in first]


def test_key_ranges_do_not_meet() -> None:
    """Seed, purpose, item, epoch and source each change every number."""
    base = {"item": 1, "epoch": 1, "source": 1}
    streams = [rng.generator(0, purpose, **base).random(4) for purpose in (1, 2, 3, 4)]
    streams.append(rng.generator(1, 2, **base).random(4))
    streams += [rng.generator(0, 2, **{**base, name: 2}).random(4) for name in base]
    values = np.concatenate(streams)
    assert len(np.unique(values)) == len(values)
    assert np.array_equal(rng.generator(-1, 2).random(4), rng.generator(2**64 - 1, 2).random(4))
