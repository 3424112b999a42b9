"""What guessing would score: the chance level of every number in a report, in closed form.

A guesser orders the gallery at random (retrieval), names a class at random (classification), or draws every pixel's
class at random (segmentation). Percent where the metric is in percent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb

from cosmos_fast.evaluate.retrieval import RECALL_AT


def retrieval_chance(captions_per_image: Sequence[int]) -> dict[str, float]:
    """Expected `retrieval_metrics` of a random order, for images that own `captions_per_image[i]` captions each.

    Image -> text: with m own captions among M, P(best rank > k) = C(M-m, k) / C(M, k) and E(best rank) = (M+1)/(m+1).
    Text -> image: the rank is uniform on 1..N.
    """
    images, captions = len(captions_per_image), sum(captions_per_image)
    if images == 0 or min(captions_per_image) < 1:
        raise ValueError("chance needs at least one image, and a caption for each")
    owned = Counter(captions_per_image)

    def found_within(k: int) -> float:
        k = min(k, captions)
        return sum(n * (1 - comb(captions - m, k) / comb(captions, k)) for m, n in owned.items()) / images

    metrics = {f"i2t_r{k}": 100.0 * found_within(k) for k in RECALL_AT}
    metrics["i2t_mean_rank"] = sum(n * (captions + 1) / (m + 1) for m, n in owned.items()) / images
    metrics["i2t_median_rank"] = _median_rank(captions, owned, images)
    metrics |= {f"t2i_r{k}": 100.0 * min(k, images) / images for k in RECALL_AT}
    metrics["t2i_mean_rank"] = metrics["t2i_median_rank"] = (images + 1) / 2
    return metrics


def _median_rank(captions: int, owned: Counter[int], images: int) -> float:
    """Midpoint of the ranks where P(best own rank <= k) reaches and passes 1/2; C(M-m, k)/C(M, k) is carried along."""
    miss = dict.fromkeys(owned, 1.0)
    reached = 0
    for k in range(1, captions + 1):
        for m in owned:
            miss[m] *= max(0, captions - m - k + 1) / (captions - k + 1)
        missed = sum(n * miss[m] for m, n in owned.items()) / images
        if not reached and missed <= 0.5 + 1e-12:
            reached = k
        if missed < 0.5 - 1e-12:
            return (reached + k) / 2
    return float(captions)


def classification_chance(classes: int, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """`top1`, `top5` in percent of a uniform guess among `classes`."""
    return {f"top{k}": 100.0 * min(k, classes) / classes for k in ks}


def segmentation_chance(pixels_per_class: Sequence[int]) -> float:
    """Mean IoU in percent when each pixel gets a class uniformly at random, given the ground truth's pixel counts.

    Class c with n of N pixels is hit n/C times and drawn N/C times: IoU = (n/C) / (n + N/C - n/C). In expectation over
    many pixels this is exact; classes that never occur still count (they are drawn, and never right), as in `mean_iou`.
    """
    classes, total = len(pixels_per_class), sum(pixels_per_class)
    if total == 0:
        raise ValueError("no labelled pixel")
    ious = [(n / classes) / (n + (total - n) / classes) for n in pixels_per_class]
    return 100.0 * sum(ious) / classes


def constant_segmentation(pixels_per_class: Sequence[int], label: int = 0) -> float:
    """Mean IoU in percent of a map that says `label` everywhere: the other trivial answer ("all background")."""
    total = sum(pixels_per_class)
    present = sum(1 for c, n in enumerate(pixels_per_class) if n > 0 or c == label)
    return 100.0 * (pixels_per_class[label] / total) / present
