"""Zero-shot classification of images by the nearest class text, top-1 and top-5.

Axis legend: B images, C classes, D embed. Ties count against the model, as in retrieval.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cosmos_fast.evaluate.encoder import Encoder
from cosmos_fast.evaluate.retrieval import BLOCK_ELEMENTS, ranks_of_targets

TOP_K = (1, 5)


def top_k_accuracy(image_BD: Tensor, class_CD: Tensor, label_B: Tensor, ks: Sequence[int] = TOP_K) -> dict[str, float]:
    """`top1`, `top5` in percent of normalised image features against normalised class features; label_B int64."""
    if len(image_BD) == 0 or len(label_B) != len(image_BD):
        raise ValueError(f"{len(image_BD)} images and {len(label_B)} labels: give one label per image, at least one")
    step = max(1, BLOCK_ELEMENTS // len(class_CD))
    ranks = torch.cat(
        [
            ranks_of_targets(image_BD[start : start + step] @ class_CD.T, label_B[start : start + step])
            for start in range(0, len(image_BD), step)
        ]
    )
    return {f"top{k}": 100.0 * (ranks <= k).double().mean().item() for k in ks}


@torch.no_grad()
def encode_images(model: Encoder, batches: Iterable[Tensor]) -> Tensor:
    """Normalised features [N, D] float32 of image batches [B, 3, H, W], on the model's device; [0] of none."""
    device = next(model.parameters()).device
    found = [model.encode_image(batch.to(device), normalize=True).float() for batch in batches]
    return torch.cat(found) if found else torch.empty(0, device=device)
