"""Zero-shot segmentation: what each patch says about each class text, window by window, and mean IoU.

Axis legend: B windows, P patches, D embed, S synonyms, C classes, H, W pixels.

Protocol, as COSMOS evaluates it: patch tokens after `ln_post` and `proj`, cosine with the text feature of each synonym;
a window of the training size slides with stride half of it over the image (short side 1.5 windows); the map of each
window is enlarged bilinearly, overlaps are averaged, the whole is resized to the image, multiplied by 40, softmax over
all synonyms, maximum over the synonyms of a class, argmax. Without a probability threshold the last four steps pick the
class of the synonym with the largest cosine, because the softmax keeps the order and its denominator is common to a
pixel: so it is not formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cosmos_fast.evaluate.encoder import Encoder

IGNORE = 255


@dataclass(frozen=True, kw_only=True)
class SegmentationProtocol:
    """Fixed numbers of the protocol. `short_side` is in windows: 336 px for a window of 224 px in the paper."""

    short_side: float = 1.5
    stride: float = 0.5
    batch_size: int = 256


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


def resized_shape(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Shape with the short side `short_side` and the aspect kept, never below it after rounding."""
    factor = short_side / min(height, width)
    return max(short_side, round(height * factor)), max(short_side, round(width * factor))


@dataclass(frozen=True)
class _Window:
    image: int
    top: int
    left: int
    pixels_3HW: Tensor


def _windows(image: int, pixels_3HW: Tensor, size: int, stride: int) -> Iterator[_Window]:
    for top in window_starts(pixels_3HW.shape[1], size, stride):
        for left in window_starts(pixels_3HW.shape[2], size, stride):
            yield _Window(image, top, left, pixels_3HW[:, top : top + size, left : left + size])


@dataclass
class _Canvas:
    """Sum of the window maps of one image, and how many windows covered each pixel.

    Synonyms stand last in memory: interpolation and the final maximum are 2 and 5 times as fast that way on a CPU.
    """

    sum_HWS: Tensor
    count_HW1: Tensor
    missing: int

    @classmethod
    def blank(cls, shape_3HW: torch.Size, synonyms: int, windows: int, device: torch.device) -> _Canvas:
        _, height, width = shape_3HW
        sums, counts = (torch.zeros(height, width, depth, device=device) for depth in (synonyms, 1))
        return cls(sums, counts, windows)

    def add(self, top: int, left: int, size: int, cosine_hwS: Tensor) -> None:
        """Enlarge the grid of one window, here and not in its batch, so that memory does not grow with the batch."""
        self.sum_HWS[top : top + size, left : left + size] += enlarge(cosine_hwS, (size, size))
        self.count_HW1[top : top + size, left : left + size] += 1
        self.missing -= 1

    def mean(self) -> Tensor:
        return self.sum_HWS.div_(self.count_HW1)


def enlarge(map_hwS: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bilinear resize of [h, w, S] to [*shape, S]."""
    # Permuting after [None] keeps the strides of a channels-last batch, without which torch copies in and out.
    channels_last = map_hwS[None].permute(0, 3, 1, 2)
    large = functional.interpolate(channels_last, size=shape, mode="bilinear", align_corners=False)
    return large.permute(0, 2, 3, 1)[0]


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

    Windows of consecutive images share batches; an image's map is yielded as soon as its last window is in.
    """
    stride = max(1, round(window * protocol.stride))
    device = next(model.parameters()).device
    canvases: dict[int, _Canvas] = {}
    waiting: list[_Window] = []
    next_image = 0

    def flush() -> None:
        pixels_B3HW = torch.stack([part.pixels_3HW for part in waiting]).to(device)
        for part, cosine_hwS in zip(waiting, dense_cosines(model, pixels_B3HW, text_SD, csa=csa), strict=True):
            canvases[part.image].add(part.top, part.left, window, cosine_hwS)
        waiting.clear()

    for index, pixels_3HW in enumerate(images):
        parts = list(_windows(index, pixels_3HW, window, stride))
        canvases[index] = _Canvas.blank(pixels_3HW.shape, len(text_SD), len(parts), device)
        for part in parts:
            waiting.append(part)
            if len(waiting) == protocol.batch_size:
                flush()
        while next_image in canvases and canvases[next_image].missing == 0:
            yield canvases.pop(next_image).mean()
            next_image += 1
    if waiting:
        flush()
    for index in sorted(canvases):
        yield canvases[index].mean()


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
    runs = [_runs(class_S) for class_S in class_sets]
    shapes: list[tuple[int, int]] = []

    def pixels() -> Iterator[Tensor]:
        for pixels_3HW, shape in images:
            shapes.append(shape)
            yield pixels_3HW

    maps = sliding_cosines(model, pixels(), text_SD, window=window, csa=csa, protocol=protocol)
    for index, cosine_HWS in enumerate(maps):
        large_HWS = enlarge(cosine_HWS, shapes[index])
        yield tuple(_labels(large_HWS, *pair).cpu() for pair in zip(class_sets, runs, strict=True))
        on_done()


def _runs(class_S: Tensor) -> list[tuple[int, int]]:
    """Ranges of neighbouring wordings that a class set uses: their maps are views, those of a list would be copies."""
    edges = torch.diff((class_S >= 0).int().cpu(), prepend=torch.zeros(1), append=torch.zeros(1))
    starts, stops = ((edges == sign).nonzero().squeeze(1).tolist() for sign in (1, -1))
    return list(zip(starts, stops, strict=True))


def _labels(cosine_HWS: Tensor, class_S: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    """The class of the nearest wording of every pixel, uint8 [h, w]."""
    nearest_HW, labels_HW = None, None
    for start, stop in runs:
        best = cosine_HWS[..., start:stop].max(dim=-1)
        found_HW = class_S[start:stop].to(torch.uint8)[best.indices]
        if nearest_HW is None or labels_HW is None:
            nearest_HW, labels_HW = best.values, found_HW
        else:
            labels_HW = torch.where(best.values > nearest_HW, found_HW, labels_HW)
            nearest_HW = torch.maximum(nearest_HW, best.values)
    assert labels_HW is not None, "a class set without wordings"
    return labels_HW
