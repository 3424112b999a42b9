"""Colours of crops against PIL: the native library to the bit, torch within what its arithmetic leaves open."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.original_input import recolor as pil_view
from cosmos_fast.config import ViewsConfig
from cosmos_fast.data import rng
from cosmos_fast.data.augment import ViewNumbers, draw_views
from cosmos_fast.data.images import to_pixels
from cosmos_fast.data.recolor import ColorNumbers, color_numbers
from cosmos_fast.ops.recolor import recolor_
from cosmos_kernels import native, recolor_native
from tests.unit.test_images import PLAIN, textured

WHY_NO_NATIVE = native.why_missing("cpu")
needs_native = pytest.mark.skipif(WHY_NO_NATIVE is not None, reason=str(WHY_NO_NATIVE))
BACKENDS = ["eager", pytest.param("native", marks=needs_native)]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def recolored(image: Image.Image, view: ViewNumbers, backend: str) -> np.ndarray:
    pixels = to_pixels(image)[None].contiguous()
    return recolor_(pixels, color_numbers([view]), backend=backend)[0].permute(1, 2, 0).numpy().astype(int)


def difference_to_pil(image: Image.Image, view: ViewNumbers, backend: str) -> np.ndarray:
    return np.abs(recolored(image, view, backend) - np.asarray(pil_view(image, view)))


@each_backend
@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.0, 0.6, 0.8371, 1.0, 1.2113, 1.4])
def test_blends_equal_pil(operation: str, factor: float, backend: str) -> None:
    assert not difference_to_pil(textured(48), replace(PLAIN, jitter=((operation, factor),)), backend).any()


@each_backend
@pytest.mark.parametrize("turns", [-0.5, -0.1, -0.033, 0.0, 0.02, 0.1, 0.5])
def test_hue_follows_pil(turns: float, backend: str) -> None:
    difference = difference_to_pil(textured(48), replace(PLAIN, jitter=(("hue", turns),)), backend)
    assert difference.mean() < (0.02 if backend == "eager" else 1e-9)
    assert (difference > 2).mean() < 0.001  # torch: a hue on the edge of two 8-bit steps falls to the other side


def test_hue_copies_nothing_from_the_host_that_a_gpu_would_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(*arguments: object, **named: object) -> None:
        raise AssertionError(f"torch.tensor{arguments}")

    monkeypatch.setattr(torch, "tensor", copied)
    assert difference_to_pil(textured(48), replace(PLAIN, jitter=(("hue", 0.1),)), "eager").mean() < 0.02


@each_backend
def test_hue_leaves_greys_and_primaries_in_place(backend: str) -> None:
    greys = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2))
    view = replace(PLAIN, jitter=(("hue", 0.1),))
    assert np.array_equal(recolored(greys, view, backend), np.asarray(greys))
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 0, 0], [7, 7, 9]], np.uint8)
    assert difference_to_pil(Image.fromarray(colours.reshape(2, 3, 3)), view, backend).max() <= 1


@each_backend
@pytest.mark.parametrize("radius", [0.1, 0.33, 0.77, 1.2, 1.41, 1.4143, 1.7, 1.999])
@pytest.mark.parametrize("size", [24, 65])
def test_blur_follows_pil_up_to_the_border(radius: float, size: int, backend: str) -> None:
    difference = difference_to_pil(textured(size), replace(PLAIN, blur_radius=radius), backend)
    assert difference.max() <= 2
    assert difference.mean() < 0.2


@each_backend
def test_grey_solarise_and_flip_equal_pil(backend: str) -> None:
    for view in (
        replace(PLAIN, gray=True),
        replace(PLAIN, solarize_threshold=128),
        replace(PLAIN, solarize_threshold=0),
        replace(PLAIN, solarize_threshold=255),
        replace(PLAIN, flip=True),
        replace(PLAIN, gray=True, solarize_threshold=200, flip=True),
    ):
        assert not difference_to_pil(textured(33), view, backend).any(), view


def drawn_views(count: int, size: int) -> list[ViewNumbers]:
    crop = ViewsConfig(local_solarize_p=0.3, local_image_size=size).crops(size)[-1]
    return [draw_views([crop], 60, 60, rng.generator(0, rng.CROPS, item=i))[0] for i in range(count)]


def test_whole_views_follow_pil_in_torch() -> None:
    """Order of the operations: jitter in its drawn order, grey, blur, solarise, flip."""
    for number, view in enumerate(drawn_views(60, 32)):
        view = replace(view, solarize_threshold=None)  # it turns a level's difference at the threshold into 127
        difference = difference_to_pil(textured(32, seed=number), view, "eager")
        assert difference.mean() < 0.6, view
        assert (difference > 4).mean() < 0.01, view


def boxes() -> Iterator[tuple[int, int]]:
    """Widths and heights: a pixel, less than a blur reaches, less and more than the lanes of a vector and a run."""
    yield from ((1, 1), (7, 1), (1, 7), (3, 5), (33, 32), (96, 96), (300, 65))


@needs_native
def test_native_gives_the_bits_of_pil() -> None:
    """Drawn views of all kinds, on crops of all shapes."""
    kinds = ViewsConfig(local_solarize_p=0.3).crops(224)
    number = 0
    for width, height in boxes():
        for crop in kinds * 6:
            number += 1
            view = draw_views([crop], 60, 60, rng.generator(0, rng.CROPS, item=number))[0]
            image = textured(max(width, height), seed=number).crop((0, 0, width, height))
            assert not difference_to_pil(image, view, "native").any(), (view, width, height)


@needs_native
@pytest.mark.parametrize("radius", [0.01, 0.5, 1.0, 1.5, 2.0, 2.7, 5.0, 31.0])
def test_native_blurs_of_any_radius_are_those_of_pil(radius: float) -> None:
    """Boxes of one, three and more pixels, wider than the crop too."""
    for width, height in boxes():
        image = textured(max(width, height)).crop((0, 0, width, height))
        assert not difference_to_pil(image, replace(PLAIN, blur_radius=radius), "native").any(), (width, height)


@needs_native
@pytest.mark.parametrize("turns", [0.1, -0.037])
def test_native_hue_of_a_million_colours_is_that_of_pil(turns: float) -> None:
    """All pairs of red and green with 16 blues each; a prime stride meets every blue."""
    red, green = np.mgrid[0:256, 0:256]
    blues = [(17 * red + 251 * green + 16 * step) % 256 for step in range(16)]
    pixels = np.concatenate([np.stack([red, green, blue], -1) for blue in blues]).astype(np.uint8)
    assert not difference_to_pil(Image.fromarray(pixels), replace(PLAIN, jitter=(("hue", turns),)), "native").any()


def batch(count: int) -> tuple[torch.Tensor, ColorNumbers]:
    pixels = torch.stack([to_pixels(textured(32, seed=n)) for n in range(count)]).contiguous()
    return pixels, color_numbers(drawn_views(count, 32))


@each_backend
@pytest.mark.parametrize("chunk_values", [1, 3 * 32 * 32 * 7, 1 << 30])
def test_a_crop_does_not_depend_on_its_batch(backend: str, chunk_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, numbers = batch(40)
    rows = [ColorNumbers(*(column[n : n + 1] for column in numbers)) for n in range(40)]
    alone = torch.cat([recolor_(pixels[n : n + 1].clone(), row, backend=backend) for n, row in enumerate(rows)])
    monkeypatch.setattr("cosmos_fast.ops.recolor_eager._CHUNK_VALUES", chunk_values)
    assert torch.equal(recolor_(pixels.clone(), numbers, backend=backend), alone)
    assert not torch.equal(pixels, alone)


@needs_native
def test_threads_and_layouts_of_the_table_change_nothing() -> None:
    pixels, numbers = batch(9)
    expected = recolor_(pixels.clone(), numbers, backend="native")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(recolor_(pixels.clone(), numbers, backend="native"), expected)
    finally:
        torch.set_num_threads(threads)
    spread = ColorNumbers(*(np.repeat(column, 2, axis=0)[::2] for column in numbers))
    assert torch.equal(recolor_(pixels.clone(), spread, backend="native"), expected)


def one_thread_recolours(pixels: torch.Tensor, numbers: ColorNumbers, expected: torch.Tensor) -> None:
    """What a worker process of the loader does; the exit code tells."""
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(recolor_(pixels, numbers, backend="native"), expected) else 1)


@needs_native
def test_a_worker_forked_after_threads_were_used_does_not_hang() -> None:
    pixels, numbers = batch(9)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        expected = recolor_(pixels.clone(), numbers, backend="native")
    finally:
        torch.set_num_threads(threads)
    worker = multiprocessing.get_context("fork").Process(target=one_thread_recolours, args=(pixels, numbers, expected))
    worker.start()
    worker.join(120)
    exit_code = worker.exitcode
    worker.kill()
    assert exit_code == 0


def test_auto_takes_the_library_for_contiguous_crops_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setattr(recolor_native, "recolor_", lambda *_: taken.append("native"))
    pixels, numbers = batch(2)
    recolor_(pixels.clone(), numbers)
    assert taken == ([] if WHY_NO_NATIVE else ["native"])
    last = pixels.clone(memory_format=torch.channels_last)
    assert torch.equal(recolor_(last, numbers), recolor_(pixels, numbers, backend="eager"))


def test_wrong_crops_are_refused() -> None:
    pixels, numbers = batch(2)
    for wrong in (pixels.float(), pixels[:, :2], pixels[0]):
        with pytest.raises(ValueError, match="want uint8"):
            recolor_(wrong, numbers)
    with pytest.raises(ValueError, match="want 1 rows"):
        recolor_(pixels[:1], numbers)
    assert recolor_(pixels[:0], ColorNumbers(*(column[:0] for column in numbers))).shape == (0, 3, 32, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recolouring_on_a_gpu_equals_the_cpu() -> None:
    views = drawn_views(64, 48)
    pixels = torch.stack([to_pixels(textured(48, seed=n)) for n in range(64)]).contiguous()
    on_gpu = recolor_(pixels.cuda(), color_numbers(views)).cpu().int()
    difference = (on_gpu - recolor_(pixels, color_numbers(views), backend="eager").int()).abs()
    assert (difference > 0).float().mean() < 0.01
