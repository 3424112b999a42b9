"""The training objectives: COSMOS (contrastive plus cross-modal self-distillation) and plain CLIP.

Either takes the process group of a run over several ranks, and the clock that is told of its collectives.

Axes: V views, B batch, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_fast.model import CosmosFeatures, TeacherFeatures
from cosmos_fast.ops import multiview_infonce
from cosmos_fast.utils.phases import PhaseClock, no_clock


class CosmosLossOutput(NamedTuple):
    """Scalars; total = clip + distill."""

    clip: Tensor
    distill: Tensor
    total: Tensor


class CosmosLoss:
    """arXiv 2412.01814: all pairs of two block products.

    clip: mean InfoNCE of the global image views with every caption view, at `logit_scale`.
    distill: mean InfoNCE of every cross-modal student view with every teacher view, at `distill_logit_scale`; the
    teacher gets no gradient. Local image crops enter the second term only.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, backend: str = "auto", clock: PhaseClock = no_clock
    ) -> None:
        self.group = group
        self.backend = backend
        self.clock = clock

    def __call__(self, student: CosmosFeatures, teacher: TeacherFeatures | None) -> CosmosLossOutput:
        """Both terms over the global batch; see `multiview_infonce` for gradients across ranks."""
        if teacher is None:
            raise ValueError("CosmosLoss needs the teacher's features: teacher is None")
        if student.image_crossmodal is None or student.text_crossmodal is None or student.distill_logit_scale is None:
            raise ValueError("CosmosLoss needs cross-modal features; a plain CLIP model trains with ClipLoss")
        global_views = teacher.image.shape[0]
        clip = self._infonce(student.text, student.image[:global_views], student.logit_scale)
        crossmodal = [student.image_crossmodal, student.text_crossmodal]
        teacher_VBD = torch.cat([teacher.image, teacher.text]).detach()
        distill = self._infonce(crossmodal, teacher_VBD, student.distill_logit_scale)
        return CosmosLossOutput(clip, distill, clip + distill)

    def _infonce(self, a_VBD: Tensor | Sequence[Tensor], b_VBD: Tensor, scale: Tensor) -> Tensor:
        dtype = _operand_dtype(b_VBD.device)
        return multiview_infonce(
            *(a_VBD, b_VBD, scale),
            group=self.group,
            operand_dtype=dtype,
            backend=self.backend,
            clock=self.clock,
        )


class ClipLoss:
    """Mean InfoNCE of every image view with every caption view; the distillation term is zero."""

    def __init__(
        self, group: dist.ProcessGroup | None = None, backend: str = "auto", clock: PhaseClock = no_clock
    ) -> None:
        self.group = group
        self.backend = backend
        self.clock = clock

    def __call__(self, student: CosmosFeatures, teacher: TeacherFeatures | None = None) -> CosmosLossOutput:
        clip = multiview_infonce(
            student.text,
            student.image,
            student.logit_scale,
            group=self.group,
            operand_dtype=_operand_dtype(student.image.device),
            backend=self.backend,
            clock=self.clock,
        )
        return CosmosLossOutput(clip, torch.zeros_like(clip), clip)


def _operand_dtype(device: torch.device) -> torch.dtype | None:
    """Under autocast on a GPU, products in fp16: features have unit norm, so it is eight times finer than bf16."""
    return torch.float16 if device.type == "cuda" and torch.is_autocast_enabled("cuda") else None
