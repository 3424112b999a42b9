"""Images read ahead of a model by threads, the batch that fits, and products in bf16."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cosmos_fast.data.images import eval_crop, to_pixels
from cosmos_fast.evaluate import batch_fit
from cosmos_fast.evaluate.batch_fit import fitting_batch
from cosmos_fast.evaluate.encoder import InBf16
from cosmos_fast.evaluate.feeding import BATCHES_AHEAD, batches_ahead, encode_blocks
from cosmos_fast.model.cosmos import CosmosModel, create_model
from cosmos_fast.utils.errors import UserError
from tests.fake_sets import FakeImages
from tests.unit.test_eval_cli import tiny_config


def tiny_model() -> CosmosModel:
    torch.manual_seed(3)
    return create_model(tiny_config("demo", Path("nowhere")).model).eval()


def test_batches_come_in_order_whoever_reads_first() -> None:
    images = FakeImages(count=11)
    blocks = [range(4), range(4, 5), range(5, 11)]
    found = list(batches_ahead(images, blocks, 16, threads=5))
    assert [tuple(batch.shape) for batch in found] == [(4, 3, 16, 16), (1, 3, 16, 16), (6, 3, 16, 16)]
    expected = [to_pixels(eval_crop(images.image(number), 16)) for number in range(11)]
    torch.testing.assert_close(torch.cat(found), torch.stack(expected), rtol=0, atol=0)


def test_no_more_than_a_few_batches_are_read_ahead() -> None:
    images = FakeImages(count=100)
    batches = batches_ahead(images, [range(k, k + 2) for k in range(0, 100, 2)], 8, threads=2)
    for taken in range(1, 5):
        next(batches)
        assert images.reads <= 2 * (taken + BATCHES_AHEAD)
    batches.close()
    assert images.reads <= 2 * (4 + BATCHES_AHEAD)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("evaluation")]


def test_a_broken_image_ends_the_reading_with_its_own_words() -> None:
    images = FakeImages(count=8, broken=frozenset([3]))
    with pytest.raises(UserError, match=r"3\.jpg is broken"):
        list(batches_ahead(images, [range(8)], 8, threads=3))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("evaluation")]


def test_bf16_products_give_nearly_the_same_features_in_fp32() -> None:
    model = tiny_model()
    pixels, tokens = torch.randn(3, 3, 16, 16), torch.randint(1, 400, (3, 8))
    tokens[:, -1] = 49407
    with torch.no_grad():
        for normalize in (True, False):
            plain = (model.encode_image(pixels, normalize), model.encode_text(tokens, normalize))
            rounded = (InBf16(model).encode_image(pixels, normalize), InBf16(model).encode_text(tokens, normalize))
            for one, other in zip(plain, rounded, strict=True):
                assert other.dtype == torch.float32
                assert not torch.equal(one, other)
                torch.testing.assert_close(other, one, rtol=0.05, atol=0.05)
        dense = InBf16(model).encode_image_dense(pixels, csa=True)
        assert dense.dtype == torch.float32
        torch.testing.assert_close(dense, model.encode_image_dense(pixels, csa=True), rtol=0.05, atol=0.05)
    assert InBf16(model).config == model.config


def test_images_are_counted_and_no_batch_is_part_of_two_blocks() -> None:
    model, images, counted, sizes = tiny_model(), FakeImages(), [], []
    plain = model.encode_image

    def encode(pixels: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        sizes.append(len(pixels))
        return plain(pixels, normalize)

    watched: Any = SimpleNamespace(encode_image=encode, parameters=model.parameters)
    found = encode_blocks(watched, images, [[0, 2], [5], [6, 1, 3]], 16, on_image=lambda: counted.append(1))
    assert sizes == [len(part) for part in found] == [2, 1, 3]
    assert len(counted) == 6
    assert encode_blocks(watched, images, [], 16) == []


class _Small:
    """Stands for a model on a GPU that holds so many images."""

    def __init__(self, holds: int) -> None:
        self.holds, self.tried = holds, []
        self.config = SimpleNamespace(vision=SimpleNamespace(image_size=2))

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        self.tried.append(len(pixels))
        if len(pixels) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pixels


@pytest.mark.parametrize(("holds", "found"), [(1000, 256), (255, 128), (1, 1)])
def test_the_batch_is_halved_until_it_fits(holds: int, found: int) -> None:
    model: Any = _Small(holds)
    assert batch_fit._fits_by_trial(model, torch.device("cpu")) == found
    assert model.tried == [256 >> step for step in range(len(model.tried))]


def test_a_model_without_room_is_one_line_and_a_cpu_tries_nothing() -> None:
    none: Any = _Small(0)
    with pytest.raises(UserError, match="does not hold the model and one image"):
        batch_fit._fits_by_trial(none, torch.device("cpu"))
    assert fitting_batch(tiny_model()) == batch_fit.CPU_BATCH
