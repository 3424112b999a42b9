"""The 80 pairwise losses of COSMOS, one after the other, each with two logit matrices, as the original has them.

Axes: B batch, D embedding. A view is [B, D], normalised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.eager_cosmos.model import EagerFeatures

GLOBAL_VIEWS = 2


class EagerLosses(NamedTuple):
    """Scalars; the total is their plain sum."""

    clip: Tensor
    distill: Tensor

    @property
    def total(self) -> Tensor:
        return self.clip + self.distill


def infonce(a_BD: Tensor, b_BD: Tensor, scale: Tensor) -> Tensor:
    """½ [CE(scale a bᵀ, diagonal) + CE(scale b aᵀ, diagonal)]; the two products are formed separately."""
    labels = torch.arange(a_BD.shape[0], device=a_BD.device)
    logits_ab = scale * a_BD @ b_BD.T
    logits_ba = scale * b_BD @ a_BD.T
    return (F.cross_entropy(logits_ab, labels) + F.cross_entropy(logits_ba, labels)) / 2


PairLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def mean_over_pairs(rows: list[Tensor], columns: list[Tensor], scale: Tensor, pair_loss: PairLoss) -> Tensor:
    """Mean of `infonce` over all pairs of a row view and a column view."""
    losses = [pair_loss(row, column, scale) for row in rows for column in columns]
    return torch.stack(losses).sum() / len(losses)


def cosmos_loss(
    student: EagerFeatures, teacher: EagerFeatures, batch: int, pair_loss: PairLoss = infonce
) -> EagerLosses:
    """CLIP term: 2 global image views x all captions. Distillation: all cross-modal views x the teacher's views.

    pair_loss: `infonce`, or a compiled one.
    """
    assert student.image_crossmodal is not None
    assert student.text_crossmodal is not None
    images = list(student.image.split(batch))[:GLOBAL_VIEWS]
    crossmodal = [*student.image_crossmodal.split(batch), *student.text_crossmodal.split(batch)]
    targets = [*teacher.image.detach().split(batch), *teacher.text.detach().split(batch)]
    clip = mean_over_pairs(images, list(student.text.split(batch)), student.logit_scale, pair_loss)
    distill = mean_over_pairs(crossmodal, targets, student.distill_logit_scale, pair_loss)
    return EagerLosses(clip, distill)
