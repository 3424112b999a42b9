"""What reaches the pixels in each loader: the numbers that were drawn, with the published shares and ranges."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from benchmarks.stages import holders
from cosmos_fast.config import DataConfig, SourceConfig, ViewsConfig
from cosmos_fast.data import dali_pipeline, recolor, rng
from cosmos_fast.data.augment import ViewNumbers, draw_views
from cosmos_fast.data.images import denormalize
from cosmos_fast.data.loader import build_loader
from cosmos_fast.data.order import SampleOrder
from cosmos_fast.data.recolor import ColorNumbers, color_numbers
from tests.shards import write_tar

SIDE, KEYS, BATCH, SEED = 256, 20, 64, 5
CUT, COLOURED = 192, 512  # samples
GLOBAL_PX, LOCAL_PX = 32, 24
NO_COLOURS = ViewsConfig(
    local_image_size=LOCAL_PX, jitter_p=0, gray_p=0, global_blur_p=(0,), local_blur_p=0, global_solarize_p=(0,)
)
DALI = pytest.param("dali", marks=pytest.mark.skipif(bool(dali_pipeline.why_unusable("cpu")), reason="no DALI"))
LOADERS = ["pil", DALI]


def map_of_itself() -> bytes:
    """A JPEG whose red is the column and whose green is the row, so that a crop tells where it was cut."""
    row, column = np.mgrid[0:SIDE, 0:SIDE]
    pixels = np.stack([column, row, np.full_like(row, 150)], axis=-1).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=98, subsampling=0)
    return out.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maps")
    image, record = map_of_itself(), json.dumps({"raw_caption": ["a map"]}).encode()
    members = {f"{key:03d}.{kind}": data for key in range(KEYS) for kind, data in (("jpg", image), ("json", record))}
    write_tar(folder / "0.tar", members)
    return folder


class Seen(NamedTuple):
    """crops: uint8 [N, 3, S, S] a view. colors: what was applied, by view."""

    crops: list[np.ndarray]
    colors: list[ColorNumbers]


def seen(shards: Path, loader: str, views: ViewsConfig, samples: int, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What so many samples became: crops, and the numbers that reached the code that recolours."""
    applied: list[ColorNumbers] = []
    original = recolor.recolor_

    def recorded(pixels: Any, numbers: ColorNumbers) -> Any:
        applied.append(numbers)
        return original(pixels, numbers)

    for holder, name in holders("cosmos_fast.data.recolor:recolor_"):
        monkeypatch.setattr(holder, name, recorded)
    config = DataConfig(train=(SourceConfig(path=str(shards)),), views=views, loader=loader, workers=0)  # type: ignore[arg-type]
    opened = build_loader(config, image_size=GLOBAL_PX, context_length=8, seed=SEED, batch_size=BATCH)
    batches = list(islice(iter(opened), samples // BATCH))
    opened.close()
    crops = [
        np.concatenate([denormalize(batch.images[view]).numpy() for batch in batches])
        for view in range(views.image_views)
    ]
    return Seen(crops, list(by_view(applied[: 2 * len(batches)], views)))


def by_view(applied: list[ColorNumbers], views: ViewsConfig) -> Iterator[ColorNumbers]:
    """Tables of both stacks of each batch, view-major, sorted into one table a view."""
    stacks = [applied[0::2], applied[1::2]]
    for view in range(views.image_views):
        number, offset = (0, view) if view < views.global_crops else (1, view - views.global_crops)
        rows = slice(offset * BATCH, (offset + 1) * BATCH)
        columns = zip(*([column[rows] for column in table] for table in stacks[number]), strict=True)
        yield ColorNumbers(*(np.concatenate(column) for column in columns))


def drawn(views: ViewsConfig, samples: int) -> list[list[ViewNumbers]]:
    """The numbers of each sample, as the contract says: from seed, epoch and sample alone."""
    order = SampleOrder([KEYS], [1.0], SEED)
    places = [order.locate(position) for position in range(samples)]
    at = [{"item": place.sample, "epoch": place.epoch, "source": place.source} for place in places]
    crops = views.crops(GLOBAL_PX)
    return [draw_views(crops, SIDE, SIDE, rng.generator(SEED, rng.CROPS, **where)) for where in at]


def places_of(crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [N, 4] left, top, right, bottom and flips [N], read from the colours of crops [N, 3, S, S]."""
    size = crops.shape[-1]
    inner = np.arange(4, size - 4)  # the kernel is cut off at the borders
    across, down = crops[:, 0].mean(1)[:, inner], crops[:, 1].mean(2)[:, inner]
    edges = []
    for profile in (across, down):
        slope, start = np.polyfit(inner + 0.5, profile.T, 1)
        ends = np.sort(np.stack([start, start + slope * size]), axis=0) + 0.5
        edges.append((ends, slope < 0))
    (columns, flipped), (rows, upside_down) = edges
    assert not upside_down.any()
    return np.stack([columns[0], rows[0], columns[1], rows[1]], axis=1), flipped


@pytest.mark.parametrize("loader", LOADERS)
def test_boxes_and_flips_in_the_pixels_are_the_drawn_ones(
    shards: Path, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    crops, numbers = seen(shards, loader, NO_COLOURS, CUT, monkeypatch).crops, drawn(NO_COLOURS, CUT)
    for view, cut in enumerate(crops):
        boxes, flipped = places_of(cut.astype(float))
        expected = np.array([views[view].box for views in numbers])
        assert np.abs(boxes - expected).max() < 2.5  # source pixels
        assert np.array_equal(flipped, [views[view].flip for views in numbers])
        assert abs(flipped.mean() - 0.5) < 4 * math.sqrt(0.25 / CUT)
        low, high = (0.4, 1.0) if view < 2 else (0.05, 0.4)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / SIDE**2
        assert low - 0.02 < areas.min() < low + 0.05
        assert high - 0.05 < areas.max() < high + 0.02


@pytest.mark.parametrize("loader", LOADERS)
def test_colours_have_the_published_shares_and_ranges(
    shards: Path, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = ViewsConfig(local_image_size=LOCAL_PX)
    applied, numbers = seen(shards, loader, views, COLOURED, monkeypatch).colors, drawn(views, COLOURED)
    for view, table in enumerate(applied):
        for ours, expected in zip(table, color_numbers([all_views[view] for all_views in numbers]), strict=True):
            assert np.array_equal(ours, expected)
        blur, solarise = (1.0, 0.1, 0.5)[min(view, 2)], 0.2 if view == 1 else 0.0
        shares = (
            (0.5, table.flip),
            (0.8, table.order[:, 0] >= 0),
            (0.2, table.gray),
            (blur, table.blur_radius > 0),
            (solarise, table.solarize_threshold == 128),
        )
        for share, flags in shares:
            assert abs(flags.mean() - share) <= 4.5 * math.sqrt(share * (1 - share) / COLOURED), (view, share)
        radii = table.blur_radius[table.blur_radius > 0]
        assert 0.1 <= radii.min() < radii.max() <= 2
        jittered = table.order[:, 0] >= 0
        for operation, reach in enumerate((0.4, 0.4, 0.2, 0.1)):
            centre = 0 if operation == 3 else 1
            amounts = table.amount[table.order == operation]
            assert len(amounts) == jittered.sum()
            assert np.abs(amounts - centre).max() <= reach
            assert np.abs(amounts - centre).max() > 0.95 * reach
            assert abs(amounts.mean() - centre) < 4.5 * reach / math.sqrt(3 * len(amounts))
