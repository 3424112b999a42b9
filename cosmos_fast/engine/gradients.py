"""From the micro-batches of an optimizer step to the gradients that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos_fast.config import ViewsConfig
from cosmos_fast.data.batch import Batch
from cosmos_fast.engine.phases import PhaseClock, no_clock
from cosmos_fast.engine.precision import Precision
from cosmos_fast.loss import ClipLoss, CosmosLoss
from cosmos_fast.model import CosmosModel, TeacherFeatures


@dataclass
class Gradients:
    """Forward and backward of one optimizer step; every micro-batch has its own negatives.

    Batches move to the model's device one at a time. clock: told of every phase.
    """

    student: CosmosModel
    teacher: CosmosModel
    objective: CosmosLoss | ClipLoss
    views: ViewsConfig
    precision: Precision
    clock: PhaseClock = no_clock

    def accumulate(self, batches: Sequence[Batch]) -> Tensor:
        """Add the gradients of the mean loss to the student's parameters; returns [3]: clip, distill and total loss."""
        return torch.stack([self._add(batch, share=1.0 / len(batches)) for batch in batches]).sum(dim=0)

    def _add(self, batch: Batch, share: float) -> Tensor:
        batch = batch.to(self.student.logit_scale.device)
        teacher = self._encode_teacher(batch)
        with self.clock("student"), self.precision.autocast():
            student = self.student(batch.images, batch.texts)
        with self.clock("loss"), self.precision.autocast():
            output = self.objective(student, teacher)
        with self.clock("backward"):
            (output.total * share).backward()
        return torch.stack([output.clip, output.distill, output.total]).detach() * share

    def _encode_teacher(self, batch: Batch) -> TeacherFeatures | None:
        """What the distillation term compares with; plain CLIP has no such term."""
        if isinstance(self.objective, ClipLoss):
            return None
        images, texts = batch.images[: self.views.global_crops], batch.texts[: self.views.global_captions]
        with self.clock("teacher"), torch.no_grad(), self.precision.autocast():
            return self.teacher.encode_views(images, texts)
