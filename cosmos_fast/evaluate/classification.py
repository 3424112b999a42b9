"""Zero-shot classification of images by the nearest class text: top-1, top-5, and top-1 averaged over classes.

Axis legend: B images, C classes, D embed. Ties count against the model, as in retrieval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cosmos_fast.evaluate.encoder import Encoder
from cosmos_fast.evaluate.prompts import ClassSet
from cosmos_fast.evaluate.retrieval import BLOCK_ELEMENTS, ranks_of_targets, score_blocks

TOP_K = (1, 5)


def first_of_same(classes: ClassSet) -> Tensor:
    """int64 [C]: of each class the first one that has the same prompts. In ImageNet two names stand for two classes
    each, whose features are equal: the first of the two is what a model can answer, as argmax does."""
    first: dict[tuple[tuple[str, ...], ...], int] = {}
    return torch.tensor([first.setdefault(prompts, number) for number, prompts in enumerate(classes.prompts)])


def class_ranks(image_BD: Tensor, class_CD: Tensor, label_B: Tensor, same_C: Tensor | None = None) -> Tensor:
    """Rank of each image's class among all, int64 [B], 1 = first; arguments as `top_k_accuracy`.

    same_C: of `first_of_same`; classes of the same prompts stand one after another, in their order.
    """
    if len(image_BD) == 0 or len(label_B) != len(image_BD):
        raise ValueError(f"{len(image_BD)} images and {len(label_B)} labels: give one label per image, at least one")
    step = max(1, BLOCK_ELEMENTS // len(class_CD))
    ranks = []
    for start, scores_BC in score_blocks(image_BD, class_CD, step):
        if same_C is not None:
            # Equal columns of a product may differ in their last bits; taken from one, they do not.
            scores_BC = scores_BC[:, same_C.to(scores_BC.device)]
        ranks.append(ranks_of_targets(scores_BC, label_B[start : start + step]))
    ranks_B = torch.cat(ranks)
    if same_C is None:
        return ranks_B
    # All of a kind tie and are counted as ahead of each other: those behind a class are taken off its rank again.
    seen: Counter[int] = Counter()
    behind = []
    for first in reversed(same_C.tolist()):
        behind.append(seen[first])
        seen[first] += 1
    return ranks_B - torch.tensor(behind[::-1], device=ranks_B.device)[label_B]


def top_k_accuracy(image_BD: Tensor, class_CD: Tensor, label_B: Tensor, ks: Sequence[int] = TOP_K) -> dict[str, float]:
    """`top1`, `top5` in percent of normalised image features against normalised class features; label_B int64."""
    ranks_B = class_ranks(image_BD, class_CD, label_B)
    return {f"top{k}": 100.0 * (ranks_B <= k).double().mean().item() for k in ks}


def mean_per_class(hit_B: Tensor, label_B: Tensor) -> float:
    """Percent of hits of each class, averaged over the classes that have an image; hit_B bool, label_B int64."""
    images_C = torch.bincount(label_B)
    hits_C = torch.bincount(label_B[hit_B], minlength=len(images_C)).double()
    shown_C = images_C > 0
    return 100.0 * (hits_C[shown_C] / images_C[shown_C]).mean().item()


def classification_metrics(
    image_BD: Tensor, class_CD: Tensor, label_B: Tensor, same_C: Tensor | None = None
) -> dict[str, float]:
    """All numbers of one set in percent: `top1`, `top5`, `mean_per_class` (of top-1); arguments as `class_ranks`."""
    ranks_B = class_ranks(image_BD, class_CD, label_B, same_C)
    metrics = {f"top{k}": 100.0 * (ranks_B <= k).double().mean().item() for k in TOP_K}
    return {**metrics, "mean_per_class": mean_per_class(ranks_B == 1, label_B)}


@torch.no_grad()
def encode_images(model: Encoder, batches: Iterable[Tensor]) -> Tensor:
    """Normalised features [N, D] float32 of image batches [B, 3, H, W], on the model's device; [0] of none."""
    device = next(model.parameters()).device
    found = [model.encode_image(batch.to(device), normalize=True).float() for batch in batches]
    return torch.cat(found) if found else torch.empty(0, device=device)
