"""Published segmentation sets on a model: threads read and resize images ahead of it, ranks take blocks of them.

Axis legend: S wordings, D embed, C classes, H, W pixels.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosmos_fast.evaluate import chance
from cosmos_fast.evaluate.datasets.sets import SegmentationSet
from cosmos_fast.evaluate.division import ALONE, Division
from cosmos_fast.evaluate.encoder import Model
from cosmos_fast.evaluate.feeding import ahead, reader_threads
from cosmos_fast.evaluate.pixels import segmentation_view
from cosmos_fast.evaluate.prompts import synonym_features
from cosmos_fast.evaluate.segmentation import (
    SegmentationProtocol,
    class_iou,
    confusion_matrix,
    mean_iou,
    segment,
)
from cosmos_fast.evaluate.set_runs import DEFAULT, Settings, check_finite, class_protocol, counted_tokenizer
from cosmos_fast.evaluate.tasks import TaskResult
from cosmos_fast.utils.errors import UserError

# Images whose windows share batches. More would leave ranks without work at the end, fewer fill batches badly.
IMAGES_A_BLOCK = 32


@dataclass(frozen=True)
class _Read:
    """pixels_3HW: as the model sees the image. truth_HW: uint8, of the image's own size."""

    pixels_3HW: Tensor
    truth_HW: np.ndarray


def evaluate_segmentation_set(
    model: Model, found: SegmentationSet, settings: Settings = DEFAULT, division: Division = ALONE
) -> TaskResult:
    """Mean IoU, the share of pixels that are right, and the IoU of each class, in percent, by the set's protocol.

    settings.batch_size: windows a forward. UserError: a broken image or map, on any rank; NaN in a feature.
    """
    protocol = replace(found.protocol, batch_size=settings.batch_size)
    text_SD, class_S = synonym_features(model, found.classes, counted_tokenizer(model, settings), division)
    check_finite(text_SD)
    total_CC = torch.zeros(len(found.classes.classes), len(found.classes.classes), dtype=torch.int64)
    count = len(found.images)
    blocks = [range(start, min(start + IMAGES_A_BLOCK, count)) for start in range(0, count, IMAGES_A_BLOCK)]
    with division.together():
        threads = reader_threads(division.ranks.local_world_size)
        for number in division.own(len(blocks)):
            for predicted_HW, truth_HW in segmented(
                model, found, blocks[number], text_SD, class_S, protocol, threads, settings.on_image
            ):
                total_CC += confusion_matrix(predicted_HW, truth_HW, len(total_CC))
    total_CC = torch.tensor(division.ranks.gather(total_CC.tolist())).sum(dim=0)
    return _result(found, protocol, model.config.vision.image_size, len(class_S), total_CC)


def segmented(
    model: Model,
    found: SegmentationSet,
    numbers: Iterable[int],
    text_SD: Tensor,
    class_S: Tensor,
    protocol: SegmentationProtocol,
    threads: int = 1,
    on_image: Callable[[], object] = lambda: None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Predicted and true class maps, uint8 [H, W] each, of some images of a set, in order. UserError."""
    window = model.config.vision.image_size
    truths: deque[Tensor] = deque()

    def read(number: int) -> _Read:
        image = found.images.image(number)
        name = f"{found.name}: {found.images.key(number)}"
        return _Read(segmentation_view(image, window, protocol, name), found.truth(number))

    def inputs() -> Iterator[tuple[Tensor, tuple[int, int]]]:
        for one in ahead(read, numbers, threads, waiting=threads + 1):
            truths.append(torch.from_numpy(one.truth_HW))
            yield one.pixels_3HW, (one.truth_HW.shape[0], one.truth_HW.shape[1])

    maps = segment(model, inputs(), text_SD, [class_S], window=window, csa=protocol.csa, protocol=protocol)
    for (predicted_HW,) in maps:
        yield predicted_HW, truths.popleft()
        on_image()


def _result(
    found: SegmentationSet, protocol: SegmentationProtocol, window: int, wordings: int, total_CC: Tensor
) -> TaskResult:
    pixels = total_CC.sum(dim=1).tolist()
    if not sum(pixels):
        raise UserError(f"{found.name}: no pixel of the {len(found.images)} maps belongs to a class")
    ious = zip(_told_apart(found.classes.classes), class_iou(total_CC).tolist(), strict=True)
    metrics = {
        "miou": mean_iou(total_CC),
        "pixel_accuracy": 100.0 * total_CC.diagonal().sum().item() / sum(pixels),
        **{f"iou_{name}": 100.0 * iou for name, iou in ious if not math.isnan(iou)},
    }
    expected = {"miou": chance.segmentation_chance(pixels), "pixel_accuracy": 100.0 / len(pixels)}
    ensemble = "of a wording: normalise each prompt, mean over templates, normalise; of a class: its likeliest wording"
    return TaskResult(
        metrics, expected, class_protocol(found.classes, ensemble) | _in_words(protocol, window, wordings)
    )


def _told_apart(names: Sequence[str]) -> list[str]:
    """Names, those that stood there before with a number: "cat", "cat (2)". Two classes may be called the same."""
    found: list[str] = []
    for name in names:
        one, number = name, 2
        while one in found:
            one, number = f"{name} ({number})", number + 1
        found.append(one)
    return found


def _in_words(protocol: SegmentationProtocol, window: int, wordings: int) -> dict[str, Any]:
    """What was done, JSON-ready, in pixels."""
    long = protocol.long_side * window
    return {
        "wordings": wordings,
        "window_px": window,
        "stride_px": max(1, round(protocol.stride * window)),
        "short_side_px": round(protocol.short_side * window),
        "long_side_px": None if math.isinf(long) else round(long),
        "interpolation": protocol.interpolation,
        "csa": protocol.csa,
        "scale": protocol.scale,
        "prob_threshold": protocol.prob_threshold,
        "area_threshold": protocol.area_threshold,
        "pamr_steps": protocol.pamr_steps,
        **({"pamr_dilations": list(protocol.pamr_dilations)} if protocol.pamr_steps else {}),
    }
