"""The training objectives: COSMOS (contrastive plus cross-modal self-distillation) and plain CLIP.

Either takes the process group of a run over several ranks: the loss is that of the global batch, and the gradients of a
rank are its share, so that their sum over ranks is the gradient of one process with all samples. Between ranks go the
global image views and the teacher's views, once; see `ops.infonce_ranks`.

Axes: V views, B batch, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_fast.config import TrainConfig
from cosmos_fast.model import CosmosFeatures, TeacherFeatures
from cosmos_fast.ops import Columns, infonce_terms, multiview_infonce
from cosmos_fast.utils.collectives import Collectives, Traffic
from cosmos_fast.utils.phases import PhaseClock, no_clock

TowerGradients = Literal["exact", "original"]


class CosmosLossOutput(NamedTuple):
    """Scalars; total = clip + distill."""

    clip: Tensor
    distill: Tensor
    total: Tensor


class TeacherAhead(NamedTuple):
    """The teacher's features on their way to all ranks. global_views: how many of them are images."""

    columns: Columns
    global_views: int


class _Objective:
    """What both objectives do alike.

    group: the ranks that share the global batch, each with as many samples; None for this process alone. backend: of
    `multiview_infonce`. clock: told of collectives. tower_gradients: "exact", or "original", which gives the features
    1/W of their gradient on W ranks, but not the temperatures: that is what the original's gathers without a gradient
    come to.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
        clock: PhaseClock = no_clock,
        tower_gradients: TowerGradients = "exact",
    ) -> None:
        self.collectives = None if group is None else Collectives(group, clock)
        self.backend = backend
        self.tower_gradients = tower_gradients

    @property
    def traffic(self) -> Traffic:
        """Collectives of the loss since the last take(); none in a run of one process."""
        return Traffic() if self.collectives is None else self.collectives.traffic

    def ahead(self, teacher: TeacherFeatures | None) -> TeacherFeatures | TeacherAhead | None:
        """Send the teacher's features to the other ranks while the student works; stands for them in __call__."""
        if teacher is None or self.collectives is None:
            return teacher
        teacher_VBD = torch.cat([teacher.image, teacher.text]).detach()
        dtype = _operand_dtype(teacher_VBD.device) or teacher_VBD.dtype
        return TeacherAhead(Columns(teacher_VBD, self.collectives, dtype), teacher.image.shape[0])

    def _infonce(self, terms: Sequence[tuple[Tensor | Sequence[Tensor], Tensor | Columns, Tensor]]) -> list[Tensor]:
        device = terms[0][2].device
        dtype, backend = _operand_dtype(device), self.backend
        if self.collectives is not None:
            return infonce_terms(terms, self.collectives, operand_dtype=dtype, backend=backend)
        whole = [(a, b, scale) for a, b, scale in terms if isinstance(b, Tensor)]
        return [multiview_infonce(*term, operand_dtype=dtype, backend=backend) for term in whole]

    def _of_towers(self, student: CosmosFeatures) -> CosmosFeatures:
        """The same features; with "original" less of their gradient comes back."""
        if self.collectives is None or self.tower_gradients == "exact":
            return student
        names = ("image", "text", "image_crossmodal", "text_crossmodal")
        present = {name: feature for name in names if (feature := getattr(student, name)) is not None}
        share = 1.0 / self.collectives.world_size
        return replace(student, **{name: _WeakerGradient.apply(feature, share) for name, feature in present.items()})


class CosmosLoss(_Objective):
    """arXiv 2412.01814: all pairs of two block products.

    clip: mean InfoNCE of the global image views with every caption view, at `logit_scale`.
    distill: mean InfoNCE of every cross-modal student view with every teacher view, at `distill_logit_scale`; the
    teacher gets no gradient. Local image crops enter the second term only.
    """

    def __call__(self, student: CosmosFeatures, teacher: TeacherFeatures | TeacherAhead | None) -> CosmosLossOutput:
        """Both terms over the global batch; see `multiview_infonce` for gradients across ranks."""
        if teacher is None:
            raise ValueError("CosmosLoss needs the teacher's features: teacher is None")
        if student.image_crossmodal is None or student.text_crossmodal is None or student.distill_logit_scale is None:
            raise ValueError("CosmosLoss needs cross-modal features; a plain CLIP model trains with ClipLoss")
        targets: Tensor | Columns
        if isinstance(teacher, TeacherAhead):
            global_views, targets = teacher.global_views, teacher.columns
        else:
            global_views, targets = teacher.image.shape[0], torch.cat([teacher.image, teacher.text]).detach()
        student = self._of_towers(student)
        assert student.image_crossmodal is not None
        assert student.text_crossmodal is not None
        assert student.distill_logit_scale is not None
        distill, clip = self._infonce(
            [  # in this order the gather of images, and of their gradient, has the other term's products to hide behind
                ([student.image_crossmodal, student.text_crossmodal], targets, student.distill_logit_scale),
                (student.text, student.image[:global_views], student.logit_scale),
            ]
        )
        return CosmosLossOutput(clip, distill, clip + distill)


class ClipLoss(_Objective):
    """Mean InfoNCE of every image view with every caption view; the distillation term is zero."""

    def __call__(
        self, student: CosmosFeatures, teacher: TeacherFeatures | TeacherAhead | None = None
    ) -> CosmosLossOutput:
        """The loss over the global batch; no teacher is looked at."""
        student = self._of_towers(student)
        (clip,) = self._infonce([(student.text, student.image, student.logit_scale)])
        return CosmosLossOutput(clip, torch.zeros_like(clip), clip)


def build_objective(
    config: TrainConfig, group: dist.ProcessGroup | None = None, clock: PhaseClock = no_clock
) -> CosmosLoss | ClipLoss:
    """The objective of a run, over the ranks of `group`."""
    kind = CosmosLoss if config.objective == "cosmos" else ClipLoss
    return kind(group, clock=clock, tower_gradients=config.run.tower_gradients)


class _WeakerGradient(torch.autograd.Function):
    """The identity, whose gradient comes back multiplied by `share`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, share: float) -> Tensor:
        ctx.share = share
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.share, None


def _operand_dtype(device: torch.device) -> torch.dtype | None:
    """Under autocast on a GPU, products in fp16: features have unit norm, so it is eight times finer than bf16."""
    return torch.float16 if device.type == "cuda" and torch.is_autocast_enabled("cuda") else None
