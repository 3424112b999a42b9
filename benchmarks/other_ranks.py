"""One rank among many, without the others: their features are made up, the work of this rank is real.

With B local samples of N, the eager port forms all N x N similarities of every pair of views on each rank, as the
original does; `cosmos_fast` forms B x N. Gradients that other ranks' rows would send to the local columns do not
arrive, and nothing is communicated: time and memory are those of one rank's arithmetic, losses are not those of a run.

Axes: V views, B local samples, R made-up ones, N = B + R, D embedding.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.eager_cosmos import EagerFeatures
from benchmarks.shapes import GLOBAL_VIEWS, LOCAL_VIEWS
from cosmos_fast.loss import CosmosLoss, CosmosLossOutput
from cosmos_fast.model import CosmosFeatures, TeacherFeatures

FIELDS = ("image", "text", "image_crossmodal", "text_crossmodal")


class OtherRanks:
    """Features of the other samples of the global batch: random directions, made once."""

    def __init__(self, count: int, dim: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def made_up(views: int) -> Tensor:
            return F.normalize(torch.randn(views, count, dim, generator=generator), dim=-1).to(device)

        self._student = {name: made_up(GLOBAL_VIEWS + LOCAL_VIEWS) for name in FIELDS}
        self._teacher = {name: made_up(GLOBAL_VIEWS) for name in FIELDS[:2]}

    def gather(
        self, student: EagerFeatures, teacher: EagerFeatures, batch: int
    ) -> tuple[EagerFeatures, EagerFeatures, int]:
        """For the eager port: all features [V*B, D] become [V*N, D]; the last number is N."""

        def joined(features: EagerFeatures, others: dict[str, Tensor]) -> EagerFeatures:
            parts = {name: getattr(features, name).unflatten(0, (-1, batch)) for name in others}
            return replace(
                features, **{name: _beside(part, others[name]).flatten(0, 1) for name, part in parts.items()}
            )

        total = batch + self._teacher["image"].shape[1]
        return joined(student, self._student), joined(teacher, self._teacher), total


class AmongOtherRanks:
    """`CosmosLoss` of one rank: its rows against the columns of all, where only the columns are gathered."""

    def __init__(self, others: OtherRanks, backend: str = "auto") -> None:
        self._others = others
        self._loss = CosmosLoss(backend=backend)

    def __call__(self, student: CosmosFeatures, teacher: TeacherFeatures) -> CosmosLossOutput:
        """Features [V, B, D] of this rank."""
        own, theirs = self._others._student, self._others._teacher
        columns = _beside(student.image[:GLOBAL_VIEWS], own["image"][:GLOBAL_VIEWS])
        targets = TeacherFeatures(_beside(teacher.image, theirs["image"]), _beside(teacher.text, theirs["text"]))
        return self._loss(replace(student, image=columns), targets)


def _beside(own_VBD: Tensor, others_VRD: Tensor) -> Tensor:
    """[V, N, D], the local samples first."""
    return torch.cat([own_VBD, others_VRD[: own_VBD.shape[0]].to(own_VBD.dtype)], dim=1)
