"""DALI's own side of the loader: what it is handed, how far ahead it works, and that nothing it dies of ends a run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cosmos_fast.config import DaliConfig, ViewsConfig
from cosmos_fast.data import dali_loader, faults, image_check, rng, sample
from cosmos_fast.data.augment import ViewNumbers, draw_views
from cosmos_fast.data.dali_pipeline import DaliError, DaliPipeline
from cosmos_fast.data.encoded import fits, pack
from cosmos_fast.data.image_check import CheckedImage
from cosmos_fast.data.images import crop_and_resize, decode, to_pixels
from cosmos_fast.data.sample import RawBatch
from cosmos_fast.utils.errors import UserError
from tests.loaders import Opener, kill_workers_at_the_next_batch, needs_dali, same, same_but_images, take
from tests.shards import picture, record, write_shards, write_tar
from tests.shards import sample as members_of
from tests.unit.test_images import encoded, textured

CUT = picture(1, 140, 140)[:2000]


@pytest.fixture
def opened() -> Iterator[Opener]:
    opener = Opener("dali")
    yield opener
    opener.close()


@pytest.fixture
def by_pil() -> Iterator[Opener]:
    opener = Opener("pil")
    yield opener
    opener.close()


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers' check lets through whatever has a header; workers=0 sees the patch, and so do forked workers."""

    def check(data: bytes, max_pixels: int) -> CheckedImage:
        if data[:4] == b"GIF8":
            return CheckedImage(data, *decode(data).size)
        return CheckedImage(data, 140, 140) if data == CUT else image_check.checked_image(data, max_pixels)

    monkeypatch.setattr(sample, "checked_image", check)


def with_odd(folder: Path, image: bytes) -> Path:
    members: dict[str, bytes] = {}
    for number in range(11):
        members.update(members_of(number))
    write_tar(folder / "0.tar", {**members, "odd.jpg": image, "odd.json": record(90)})
    return folder


# --- what DALI is handed


def test_pack_keeps_files_boxes_and_origins_together() -> None:
    crops = ViewsConfig().crops(20)

    views = [draw_views(crops, 40, 30, rng.generator(0, 2, item=i)) for i in range(2)]
    images = pack([1, 4], [b"first", b"2nd"], views, [(7, 0), (10, 2)])
    assert [images.file(i).tobytes() for i in range(2)] == [b"first", b"2nd"]
    left, top, right, bottom = views[1][3].box
    assert images.boxes.shape == (2, 8, 4)
    assert images.boxes[1, 3].tolist() == [top, left, bottom, right]
    assert (images.rows, images.origins) == ([1, 4], [(7, 0), (10, 2)])


def test_an_image_fits_by_pixels_and_by_bytes() -> None:
    assert fits(b"x" * 300, 10, 10, 100)
    assert not fits(b"x", 10, 11, 100)
    assert not fits(b"x" * 5000, 10, 10, 100)


@needs_dali
def test_large_images_are_cut_in_the_workers_as_pil_cuts_them(opened: Opener, by_pil: Opener, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {**members_of(0), "big.jpg": picture(1, 90, 80), "big.json": record(1)})
    mixed = opened(tmp_path, dali=DaliConfig(threads=1, max_pixels=40 * 32))
    raw = mixed.stream.__getitems__(range(2))
    assert raw.encoded is not None
    small = raw.keys.index("000000")
    assert raw.encoded.rows == [small]
    assert raw.stacks[0].pixels.shape == (2, 1, 3, 20, 20)
    batch, reference = take(mixed, 1)[0], take(by_pil(tmp_path), 1)[0]
    assert same_but_images(batch, reference)
    big = [row for row, key in enumerate(batch.keys) if key == "big"]
    for ours, theirs in zip(batch.images, reference.images, strict=True):
        assert torch.equal(ours[big], theirs[big])
    nothing_left = opened(tmp_path, dali=DaliConfig(threads=1, max_pixels=1))
    assert nothing_left.stream.__getitems__(range(2)).encoded is None
    assert same(take(nothing_left, 2)[1], take(by_pil(tmp_path), 2)[1])


# --- how far ahead


@needs_dali
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_no_more_batches_are_held_than_asked_for(opened: Opener, tmp_path: Path, ahead: int) -> None:
    folder = write_shards(tmp_path, (9,))
    loader = opened(folder, dali=DaliConfig(threads=1, ahead=ahead))
    pulled: list[RawBatch] = []
    pull = loader._next_raw
    loader._next_raw = lambda: pulled.append(pull()) or pulled[-1]  # type: ignore[method-assign, func-returns-value]
    for number, batch in enumerate(islice(iter(loader), 6), start=1):
        assert len(pulled) == number + ahead
        assert loader.position == batch.next_position == 4 * number
    reference = opened(folder)
    assert same(take(loader, 1)[0], take(reference, 7)[6])


def threads_here() -> set[int]:
    """Numbers of DALI's, by their names, and Python's."""
    found = {thread.native_id or 0 for thread in threading.enumerate()}
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has ended
            if "DALI" in path.read_text():
                found.add(int(path.parent.name))
    return found


@needs_dali
def test_dali_gets_the_threads_it_is_given_and_close_leaves_none(opened: Opener, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, (9,))
    before = threads_here()
    ran = []
    for threads in (1, 3):
        loader = opened(folder, dali=DaliConfig(threads=threads))
        take(loader, 1)
        ran.append(len(threads_here() - before))
        loader.close()
        until = time.monotonic() + 120
        while threads_here() - before and time.monotonic() < until:  # a thread that was joined may still be listed
            time.sleep(0.01)
        assert threads_here() <= before
    assert ran[1] >= ran[0] + 2  # a pool of them, or two


@needs_dali
def test_killed_worker_ends_in_one_clear_line(opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = opened(write_shards(tmp_path, (9,)), workers=2)
    stream = iter(loader)
    next(stream)
    kill_workers_at_the_next_batch(loader, monkeypatch)
    with pytest.raises(UserError, match="worker died"):
        list(islice(stream, 100))


# --- what it dies of


@needs_dali
@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_kills_the_pipeline_is_replaced_and_the_run_goes_on(
    opened: Opener, by_pil: Opener, lenient: None, tmp_path: Path, ahead: int, workers: int
) -> None:
    folder = with_odd(tmp_path, CUT)
    loader = opened(folder, workers=workers, max_bad_share=1.0, dali=DaliConfig(threads=1, ahead=ahead))
    reference = by_pil(folder, max_bad_share=1.0)
    batches, expected = take(loader, 9), take(reference, 9)
    for ours, theirs in zip(batches, expected, strict=True):
        assert same_but_images(ours, theirs)
        for x, y in zip(ours.images, theirs.images, strict=True):
            assert (x - y).abs().mean() < 0.05
    assert loader.stats == reference.stats == {faults.BROKEN_IMAGE: 3}


@needs_dali
def test_batches_beside_a_dead_one_are_those_of_a_healthy_run(opened: Opener, lenient: None, tmp_path: Path) -> None:
    folder = with_odd(tmp_path, CUT)
    loader = opened(folder, max_bad_share=1.0, dali=DaliConfig(threads=1, ahead=2))
    batches = take(loader, 6)
    dead = [number for number in range(6) if not set(range(4 * number, 4 * number + 4)).isdisjoint(_odd(loader))]
    assert 0 < len(dead) < 6
    for number in set(range(6)) - set(dead):
        alone = opened(folder, max_bad_share=1.0, start_position=4 * number, dali=DaliConfig(threads=1, ahead=0))
        assert same(take(alone, 1)[0], batches[number])


def _odd(loader: Any) -> set[int]:
    """Positions of the first two epochs where the odd sample stands."""
    index, order = loader.stream.indexes[0], loader.stream.order
    return {position for position in range(24) if index.key(order.locate(position).sample) == "odd"}


@needs_dali
def test_what_pil_can_decode_is_no_fault(
    opened: Opener, by_pil: Opener, lenient: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DALI knows no GIF: the batch is cut by PIL, nothing is replaced."""
    folder = with_odd(tmp_path, picture(3, file_format="GIF"))
    loader = opened(folder, batch_size=12)
    with caplog.at_level(logging.WARNING):
        ours, theirs = take(loader, 1)[0], take(by_pil(folder, batch_size=12), 1)[0]
    assert "odd" in ours.keys
    assert loader.stats == {}
    assert same(ours, theirs)
    assert any("built anew" in message for message in caplog.messages)


@needs_dali
def test_dali_that_fails_at_everything_is_given_up(
    opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: DaliPipeline) -> list[torch.Tensor]:
        raise DaliError("out of memory")

    monkeypatch.setattr(DaliPipeline, "collect", broken)
    with pytest.raises(UserError, match="out of memory") as error:
        take(opened(write_shards(tmp_path, (9,))), 9)
    assert "data.loader=pil" in str(error.value)
    assert "\n" not in str(error.value)


def test_hopeless_row_of_a_dead_batch_is_exhausted(tmp_path: Path, by_pil: Opener) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": b"", "a.json": record(0)})
    stream = by_pil(tmp_path).stream
    views = ViewsConfig(local_crops=3).crops(20)

    images = pack([0], [CUT], [draw_views(views, 140, 140, rng.generator(0, 2))], [(0, 0)])
    raw = RawBatch([], torch.zeros(6, 1, 24, dtype=torch.int64), ["a"], [])
    done = dali_loader.cut_by_pil(stream, raw, images)
    assert done.exhausted == 0
    assert done.faults[0].cause == faults.BROKEN_IMAGE
    assert done.faults[0].where == "0.tar:a"


# --- pixels


@needs_dali
@pytest.mark.parametrize("size", [24, 96])
def test_crops_follow_crop_and_resize(size: int) -> None:
    """What DALI cuts on a GPU, by the same graph; the parity test of the augmentation has the figures. What is cut
    in this process is equal. Boxes at the borders and of a few pixels too."""
    data, views = encoded(textured(180).crop((0, 0, 180, 140)), "JPEG"), []
    crop = replace(ViewsConfig().crops(size)[0], size=size)
    for box in ((0, 0, 180, 140), (31, 17, 160, 120), (50, 60, 61, 75), (179, 139, 180, 140)):
        views.append(ViewNumbers(box, size, False, (), False, 0.0, None))
    pixels = to_pixels(decode(data))
    for dali_cuts in (True, False):
        pipeline = DaliPipeline([crop] * 4, 1, torch.device("cpu"), threads=1, depth=1, dali_cuts=dali_cuts)
        pipeline.submit(pack([0], [data], [views], [(0, 0)]))
        cut = [view[0] for view in pipeline.collect()]
        for ours, view in zip(cut, views, strict=True):
            difference = np.abs(ours.numpy().astype(int) - crop_and_resize(pixels, view).numpy())
            assert difference.max() <= (2 if dali_cuts else 0)
            assert difference.mean() < 0.25
        pipeline.close()


@needs_dali
def test_boxes_beyond_the_image_are_an_error_of_dali() -> None:
    """The workers' check and the decoder read another size: the batch is made once more, by PIL."""
    crop = ViewsConfig().crops(24)[0]
    for dali_cuts in (True, False):
        pipeline = DaliPipeline([crop], 1, torch.device("cpu"), threads=1, depth=1, dali_cuts=dali_cuts)
        view = ViewNumbers((0, 0, 60, 33), 24, False, (), False, 0.0, None)
        pipeline.submit(pack([0], [picture(1)], [[view]], [(0, 0)]))  # 40 x 32 pixels
        with pytest.raises(DaliError):
            pipeline.collect()
        pipeline.close()
