"""Zero-shot segmentation: what each patch says about each class text, window by window, and mean IoU.

Axis legend: B windows, P patches, D embed, S synonyms, C classes, H, W pixels.

Protocol, as COSMOS evaluates it: patch tokens after `ln_post` and `proj`, cosine with the text feature of each synonym;
a window of the training size slides with stride half of it over the image (short side 1.5 windows); the map of each
window is enlarged bilinearly, overlaps are averaged, the whole is resized to the image and becomes classes as
`class_maps` says.

Memory: patch cosines wait on the patch grid, and only one image at a time is enlarged, so that it does not grow with
the images that share a batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from cosmos_fast.evaluate.class_maps import enlarge, label_map
from cosmos_fast.evaluate.encoder import Encoder
from cosmos_fast.evaluate.pamr import refine
from cosmos_fast.utils.errors import UserError

IGNORE = 255


@dataclass(frozen=True, kw_only=True)
class SegmentationProtocol:
    """Fixed numbers of the protocol.

    Lengths are in windows, the image size of the model: of 224 px in the paper, where `short_side` is 336 px (1.5).
    short_side, long_side: an image is resized to the first, or less where its long side would pass the second, but
    never below a window. interpolation: of that, "bicubic" or "bilinear" (without antialiasing). stride: of windows.
    batch_size: windows a forward of the model. csa: correlative attention in the last block, where `segment` is not
    told. scale, prob_threshold, area_threshold: see `class_maps`. pamr_steps, pamr_dilations: see `pamr`; 0 is off.
    """

    short_side: float = 1.5
    long_side: float = math.inf
    interpolation: str = "bicubic"
    stride: float = 0.5
    batch_size: int = 256
    csa: bool = True
    scale: float = 40.0
    prob_threshold: float = 0.0
    area_threshold: float = 0.0
    pamr_steps: int = 0
    pamr_dilations: tuple[int, ...] = (8, 16)


def confusion_matrix(predicted: Tensor, target: Tensor, classes: int, ignore: int = IGNORE) -> Tensor:
    """int64 [C, C]: entry [t, p] counts pixels of class t called p; both int maps of one shape, `ignore` left out."""
    keep = target != ignore
    pairs = target[keep].long() * classes + predicted[keep].long()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def class_iou(confusion_CC: Tensor) -> Tensor:
    """IoU of each class, float64 [C]; NaN where a class is neither present nor predicted."""
    confusion = confusion_CC.double()
    hit = confusion.diagonal()
    return hit / (confusion.sum(0) + confusion.sum(1) - hit)


def mean_iou(confusion_CC: Tensor) -> float:
    """Mean IoU in percent over the classes that are present or predicted somewhere."""
    return 100.0 * class_iou(confusion_CC).nanmean().item()


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Offsets of windows that cover `length` (>= window); the last one is moved back to end at the border."""
    assert length >= window
    steps = -(-(length - window) // stride) + 1
    return [min(index * stride, length - window) for index in range(steps)]


def resized_shape(height: int, width: int, short_side: int, long_side: float = math.inf) -> tuple[int, int]:
    """Shape with the short side `short_side` and the aspect kept, never below it after rounding.

    Where the long side would pass `long_side` that decides, and the short side gets smaller.
    """
    factor = short_side / min(height, width)
    if factor * max(height, width) > long_side:
        factor, short_side = long_side / max(height, width), 1
    return max(short_side, round(height * factor)), max(short_side, round(width * factor))


def input_shape(height: int, width: int, window: int, protocol: SegmentationProtocol) -> tuple[int, int]:
    """The shape in pixels that an image is resized to for a model of this window."""
    shape = resized_shape(height, width, round(protocol.short_side * window), protocol.long_side * window)
    return shape if min(shape) >= window else resized_shape(height, width, window)


@dataclass(frozen=True)
class _Window:
    top: int
    left: int
    pixels_3HW: Tensor


def _windows(pixels_3HW: Tensor, size: int, stride: int) -> Iterator[_Window]:
    for top in window_starts(pixels_3HW.shape[1], size, stride):
        for left in window_starts(pixels_3HW.shape[2], size, stride):
            yield _Window(top, left, pixels_3HW[:, top : top + size, left : left + size])


@dataclass
class _Pending:
    """An image whose windows are not all through the model: what they said so far, on the patch grid."""

    shape_HW: tuple[int, int]
    missing: int
    found: list[tuple[int, int, Tensor]] = field(default_factory=list)

    def mean(self, window: int) -> Tensor:
        """Cosines [h, w, S] of the whole image: every window enlarged, overlaps averaged.

        Synonyms stand last in memory: interpolation and the final maximum are 2 and 5 times as fast so on a CPU.
        """
        first = self.found[0][2]
        sum_HWS, count_HW1 = (first.new_zeros(*self.shape_HW, depth) for depth in (first.shape[-1], 1))
        for top, left, cosine_hwS in self.found:
            sum_HWS[top : top + window, left : left + window] += enlarge(cosine_hwS, (window, window))
            count_HW1[top : top + window, left : left + window] += 1
        return sum_HWS.div_(count_HW1)


@torch.no_grad()
def sliding_cosines(
    model: Encoder,
    images: Iterable[Tensor],
    text_SD: Tensor,
    *,
    window: int,
    csa: bool,
    protocol: SegmentationProtocol,
) -> Iterator[Tensor]:
    """Cosine maps float32 [h, w, S] of each image [3, h, w] (short side >= window), in order.

    Windows of consecutive images share batches; an image's map is yielded as soon as its last window is in. UserError:
    NaN in a feature.
    """
    stride = max(1, round(window * protocol.stride))
    device = next(model.parameters()).device
    pending: deque[_Pending] = deque()
    waiting: list[tuple[_Pending, _Window]] = []

    def flush() -> None:
        pixels_B3HW = torch.stack([part.pixels_3HW for _, part in waiting]).to(device)
        cosine_BhwS = dense_cosines(model, pixels_B3HW, text_SD, csa=csa)
        if not cosine_BhwS.isfinite().all():
            raise UserError(
                "the features of patches hold NaN or infinite values: the weights are unusable, take another checkpoint"
            )
        for (image, part), cosine_hwS in zip(waiting, cosine_BhwS, strict=True):
            image.found.append((part.top, part.left, cosine_hwS))
            image.missing -= 1
        waiting.clear()

    for pixels_3HW in images:
        parts = list(_windows(pixels_3HW, window, stride))
        pending.append(_Pending((pixels_3HW.shape[1], pixels_3HW.shape[2]), len(parts)))
        for part in parts:
            waiting.append((pending[-1], part))
            if len(waiting) == protocol.batch_size:
                flush()
        while pending and not pending[0].missing:
            yield pending.popleft().mean(window)
    if waiting:
        flush()
    while pending:
        yield pending.popleft().mean(window)


@torch.no_grad()
def dense_cosines(model: Encoder, pixels_B3HW: Tensor, text_SD: Tensor, *, csa: bool) -> Tensor:
    """Cosine of every patch with every text on the patch grid: float32 [B, h, w, S]."""
    patches_BPD = functional.normalize(model.encode_image_dense(pixels_B3HW, csa=csa).float(), dim=-1)
    side = round(patches_BPD.shape[1] ** 0.5)
    return (patches_BPD @ text_SD.T).unflatten(1, (side, side))


def segment(
    model: Encoder,
    images: Iterable[tuple[Tensor, tuple[int, int]]],
    text_SD: Tensor,
    class_sets: Sequence[Tensor],
    *,
    window: int,
    csa: bool,
    protocol: SegmentationProtocol,
    on_done: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Tensor, ...]]:
    """Label maps uint8 [h, w] at each image's own size, in order: one map a class set, from one run of the model.

    Args:
        images: normalised pixels [3, h', w'] (already at the protocol's short side), each with the wanted shape (h, w).
        text_SD: a feature a wording, from `prompts.synonym_features`.
        class_sets: int64 [S] each, the class of every wording in that set; -1 where the set does not use it.
    """
    device = next(model.parameters()).device
    sets = [class_S.to(device) for class_S in class_sets]
    seen: deque[tuple[Tensor | None, tuple[int, int]]] = deque()

    def pixels() -> Iterator[Tensor]:
        for pixels_3HW, shape in images:
            seen.append((pixels_3HW if protocol.pamr_steps else None, shape))
            yield pixels_3HW

    for cosine_HWS in sliding_cosines(model, pixels(), text_SD, window=window, csa=csa, protocol=protocol):
        pixels_3HW, shape = seen.popleft()
        if pixels_3HW is not None:
            cosine_HWS = refine(
                enlarge(cosine_HWS, shape), pixels_3HW.to(device), protocol.pamr_steps, protocol.pamr_dilations
            )
        yield tuple(label_map(cosine_HWS, class_S, shape, protocol).cpu() for class_S in sets)
        on_done()
