"""From what every pixel says about each wording to the class of every pixel.

Axis legend: S wordings (synonyms), C classes, H, W pixels.

Cosines, enlarged to the image, times `scale`; softmax over all wordings; a class has the probability of its likeliest
wording. With an area threshold t, a class other than 0 that is the likeliest at no more than t of the pixels where
class 0 is not loses all its pixels. The likeliest class that is left is the pixel's, or class 0 (the background) where
its probability is below the probability threshold.

Without thresholds that is the class of the wording with the largest cosine, because the softmax keeps the order and its
denominator is common to a pixel: so it is not formed then.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

# Cosines that are enlarged at a time, 4 bytes each: bounds the memory of large images and long lists of classes.
STRIP_ELEMENTS = 2**25


class Thresholds(Protocol):
    """The part of `segmentation.SegmentationProtocol` that counts here."""

    @property
    def scale(self) -> float: ...

    @property
    def prob_threshold(self) -> float: ...

    @property
    def area_threshold(self) -> float: ...


def enlarge(map_hwS: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bilinear resize of [h, w, S] to [*shape, S]."""
    # Permuting after [None] keeps the strides of a channels-last batch, without which torch copies in and out.
    channels_last = map_hwS[None].permute(0, 3, 1, 2)
    large = functional.interpolate(channels_last, size=shape, mode="bilinear", align_corners=False)
    return large.permute(0, 2, 3, 1)[0]


def enlarged_rows(map_hwS: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
    """Rows start to stop of `enlarge`, without the others."""
    if (start, stop) == (0, shape[0]):
        return enlarge(map_hwS, shape)
    height = map_hwS.shape[0]
    rows = torch.arange(start, stop, dtype=torch.float64)
    place = ((rows + 0.5) * (height / shape[0]) - 0.5).clamp(0, height - 1)
    above = place.long().clamp(max=max(0, height - 2))
    share_R11 = (place - above).to(map_hwS).view(-1, 1, 1)
    above = above.to(map_hwS.device)
    mixed_RwS = map_hwS[above].lerp(map_hwS[(above + 1).clamp(max=height - 1)], share_R11)
    return enlarge(mixed_RwS, (stop - start, shape[1]))


def label_map(cosine_hwS: Tensor, class_S: Tensor, shape: tuple[int, int], protocol: Thresholds) -> Tensor:
    """The class of every pixel of an image of this shape, uint8 [*shape], on the device of the cosines.

    class_S: int64, the class of every wording; -1 where it is left out.
    """
    strips = _strips(cosine_hwS, shape)
    if not (protocol.prob_threshold or protocol.area_threshold):
        runs = _runs(class_S)
        return torch.cat([_nearest(enlarged_rows(cosine_hwS, shape, *strip), class_S, runs)[1] for strip in strips])
    used = class_S >= 0
    cosine_hwS, class_S = cosine_hwS[..., used], class_S[used]
    allowed_S = torch.ones_like(class_S, dtype=torch.bool)
    if protocol.area_threshold:
        runs = _runs(class_S)
        pixels_C = sum(
            torch.bincount(
                _nearest(enlarged_rows(cosine_hwS, shape, *strip), class_S, runs)[1].flatten(), minlength=256
            )
            for strip in strips
        )
        assert isinstance(pixels_C, Tensor)
        pixels_C[0] = 0
        large_C = pixels_C > protocol.area_threshold * pixels_C.sum()
        large_C[0] = True
        allowed_S = large_C[class_S]
    return torch.cat(
        [_likeliest(enlarged_rows(cosine_hwS, shape, *strip), class_S, allowed_S, protocol) for strip in strips]
    )


def _strips(cosine_hwS: Tensor, shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Ranges of rows of the image that hold at most STRIP_ELEMENTS cosines each."""
    rows = max(1, STRIP_ELEMENTS // (shape[1] * cosine_hwS.shape[-1]))
    return [(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def _likeliest(cosine_HWS: Tensor, class_S: Tensor, allowed_S: Tensor, protocol: Thresholds) -> Tensor:
    """The class of every pixel by its probability, uint8 [h, w]; wordings that are not allowed still share in it."""
    logits_HWS = cosine_HWS * protocol.scale
    total_HW = logits_HWS.logsumexp(dim=-1)
    runs = _runs(torch.where(allowed_S, class_S, -1))
    if not runs:  # every class was too small, and there is no background
        return torch.zeros_like(total_HW, dtype=torch.uint8)
    best_HW, labels_HW = _nearest(logits_HWS, class_S, runs)
    unsure_HW = (best_HW - total_HW).exp() < protocol.prob_threshold
    return labels_HW.masked_fill_(unsure_HW, 0)


def _runs(class_S: Tensor) -> list[tuple[int, int]]:
    """Ranges of neighbouring wordings that have a class: their maps are views, those of a list would be copies."""
    edges = torch.diff((class_S >= 0).int().cpu(), prepend=torch.zeros(1), append=torch.zeros(1))
    starts, stops = ((edges == sign).nonzero().squeeze(1).tolist() for sign in (1, -1))
    return list(zip(starts, stops, strict=True))


def _nearest(values_HWS: Tensor, class_S: Tensor, runs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """The largest value of every pixel among the wordings of some runs [h, w], and its class uint8 [h, w]."""
    nearest_HW, labels_HW = None, None
    for start, stop in runs:
        best = values_HWS[..., start:stop].max(dim=-1)
        found_HW = class_S[start:stop].to(torch.uint8)[best.indices]
        if nearest_HW is None or labels_HW is None:
            nearest_HW, labels_HW = best.values, found_HW
        else:
            labels_HW = torch.where(best.values > nearest_HW, found_HW, labels_HW)
            nearest_HW = torch.maximum(nearest_HW, best.values)
    assert nearest_HW is not None, "a class set without wordings"
    assert labels_HW is not None
    return nearest_HW, labels_HW
