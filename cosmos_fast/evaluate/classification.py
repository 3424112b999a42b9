"""Zero-shot classification of images by the nearest class text: top-1, top-5, and top-1 averaged over classes.

Axis legend: B images, C classes, D embed. Ties count against the model, as in retrieval.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cosmos_fast.evaluate.encoder import Encoder
from cosmos_fast.evaluate.retrieval import BLOCK_ELEMENTS, ranks_of_targets

TOP_K = (1, 5)


def class_ranks(image_BD: Tensor, class_CD: Tensor, label_B: Tensor) -> Tensor:
    """Rank of each image's class among all, int64 [B], 1 = first; arguments as `top_k_accuracy`."""
    if len(image_BD) == 0 or len(label_B) != len(image_BD):
        raise ValueError(f"{len(image_BD)} images and {len(label_B)} labels: give one label per image, at least one")
    step = max(1, BLOCK_ELEMENTS // len(class_CD))
    return torch.cat(
        [
            ranks_of_targets(image_BD[start : start + step] @ class_CD.T, label_B[start : start + step])
            for start in range(0, len(image_BD), step)
        ]
    )


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


def classification_metrics(image_BD: Tensor, class_CD: Tensor, label_B: Tensor) -> dict[str, float]:
    """All numbers of one set in percent: `top1`, `top5`, `mean_per_class` (of top-1); arguments as `top_k_accuracy`."""
    ranks_B = class_ranks(image_BD, class_CD, label_B)
    metrics = {f"top{k}": 100.0 * (ranks_B <= k).double().mean().item() for k in TOP_K}
    return {**metrics, "mean_per_class": mean_per_class(ranks_B == 1, label_B)}


@torch.no_grad()
def encode_images(model: Encoder, batches: Iterable[Tensor]) -> Tensor:
    """Normalised features [N, D] float32 of image batches [B, 3, H, W], on the model's device; [0] of none."""
    device = next(model.parameters()).device
    found = [model.encode_image(batch.to(device), normalize=True).float() for batch in batches]
    return torch.cat(found) if found else torch.empty(0, device=device)
