"""Confusion matrices, sliding windows, and the whole protocol against a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from cosmos_fast.evaluate import segmentation as seg
from cosmos_fast.evaluate.chance import constant_segmentation, segmentation_chance


def test_confusion_matrix_equals_a_loop_and_leaves_out_ignored_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 4, (9, 11), generator=generator)
    predicted = torch.randint(0, 4, (9, 11), generator=generator)
    target[2:4] = seg.IGNORE
    expected = torch.zeros(4, 4, dtype=torch.long)
    for t, p in zip(target.flatten().tolist(), predicted.flatten().tolist(), strict=True):
        if t != seg.IGNORE:
            expected[t, p] += 1
    assert torch.equal(seg.confusion_matrix(predicted.to(torch.uint8), target.to(torch.uint8), 4), expected)


def test_mean_iou_by_hand_and_absent_classes_do_not_count() -> None:
    target = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 2, 2])
    confusion = seg.confusion_matrix(predicted, target, classes=4)
    assert seg.class_iou(confusion)[:3].tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 2])
    assert math.isnan(seg.class_iou(confusion)[3])
    assert seg.mean_iou(confusion) == pytest.approx(100 * (2 / 3 + 1 / 3 + 1 / 2) / 3)


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [(48, 48, 24, [0]), (72, 48, 24, [0, 24]), (73, 48, 24, [0, 24, 25]), (49, 48, 24, [0, 1]), (96, 48, 48, [0, 48])],
)
def test_windows_cover_everything_and_end_at_the_border(
    length: int, window: int, stride: int, expected: list[int]
) -> None:
    starts = seg.window_starts(length, window, stride)
    assert starts == expected
    assert {i for s in starts for i in range(s, s + window)} == set(range(length))


@pytest.mark.parametrize("shape", [(100, 100), (97, 311), (640, 33)])
def test_resizing_keeps_short_side_and_aspect(shape: tuple[int, int]) -> None:
    height, width = seg.resized_shape(*shape, 72)
    assert min(height, width) == 72
    assert height / width == pytest.approx(shape[0] / shape[1], rel=0.02)


class PatchModel(nn.Module):
    """Patch feature = mean colour of an 8 px patch through a fixed matrix; CSA flips its sign."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, generator=torch.Generator().manual_seed(3)))
        self.batches: list[int] = []

    def encode_image_dense(self, images: torch.Tensor, csa: bool = False) -> torch.Tensor:
        self.batches.append(len(images))
        colour = functional.avg_pool2d(images, 8).flatten(2).transpose(1, 2)
        return (colour @ self.weight) * (-1.0 if csa else 1.0)


def loop_protocol(
    model: PatchModel, pixels: torch.Tensor, shape: tuple, text: torch.Tensor, owner: list[int], csa: bool
):
    """One window at a time, with the softmax at scale 40 and the maximum over synonyms written out."""
    _, height, width = pixels.shape
    total, count = torch.zeros(len(text), height, width), torch.zeros(height, width)
    for top in seg.window_starts(height, 16, 8):
        for left in seg.window_starts(width, 16, 8):
            patches = model.encode_image_dense(pixels[None, :, top : top + 16, left : left + 16], csa)[0]
            cosine = functional.normalize(patches, dim=-1) @ text.T
            grid = cosine.T.reshape(1, len(text), 2, 2)
            total[:, top : top + 16, left : left + 16] += functional.interpolate(grid, (16, 16), mode="bilinear")[0]
            count[top : top + 16, left : left + 16] += 1
    resized = functional.interpolate((total / count)[None], shape, mode="bilinear")[0]
    probability = (40 * resized).softmax(0)
    rows = [torch.stack([probability[s] for s in range(len(text)) if owner[s] == c]).amax(0) for c in sorted({*owner})]
    return torch.stack(rows).argmax(0)


@pytest.mark.parametrize("csa", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_segment_equals_the_protocol_written_as_a_loop(csa: bool, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(5)
    model = PatchModel()
    text = functional.normalize(torch.randn(4, 5, generator=generator), dim=-1)
    owner = [0, 1, 1, 2]
    sizes = [((16, 16), (20, 20)), ((24, 37), (50, 77)), ((24, 24), (9, 9)), ((31, 24), (31, 24))]
    images = [(torch.randn(3, *small, generator=generator), shape) for small, shape in sizes]
    protocol = seg.SegmentationProtocol(batch_size=batch_size)
    maps = seg.segment(model, images, text, [torch.tensor(owner)], window=16, csa=csa, protocol=protocol)
    labels = [label for (label,) in maps]
    assert max(model.batches) <= batch_size
    assert len(labels) == len(images)
    for label, (pixels, shape) in zip(labels, images, strict=True):
        expected = loop_protocol(model, pixels, shape, text, owner, csa)
        assert label.shape == shape
        # Batching changes the last bits of a matrix product; only an exact draw of two classes may flip.
        assert (label != expected).float().mean() < 0.005
        assert len(torch.unique(expected)) > 1


def test_windows_of_several_images_share_batches() -> None:
    model = PatchModel()
    images = [(torch.zeros(3, 24, 24), (24, 24))] * 5
    protocol = seg.SegmentationProtocol(batch_size=8)
    text = torch.eye(5)[:2]
    assert len(list(seg.segment(model, images, text, [torch.arange(2)], window=16, csa=False, protocol=protocol))) == 5
    assert model.batches == [8, 8, 4]


def test_chance_equals_simulated_guessing() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.cat([torch.full((n,), c) for c, n in enumerate((150_000, 40_000, 10_000))])
    guess = torch.randint(0, 3, target.shape, generator=generator)
    simulated = seg.mean_iou(seg.confusion_matrix(guess, target, 3))
    assert segmentation_chance([150_000, 40_000, 10_000]) == pytest.approx(simulated, abs=0.15)


def test_constant_map_equals_measuring_one() -> None:
    target = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    confusion = seg.confusion_matrix(torch.zeros_like(target), target, classes=4)
    assert constant_segmentation([70, 20, 10, 0]) == pytest.approx(seg.mean_iou(confusion))
