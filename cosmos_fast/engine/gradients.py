"""From the micro-batches of an optimizer step to the gradients that it takes.

negatives="micro": the step's gradient is the mean over micro-batches, each with a loss of its own.

negatives="all": it is that of one batch of all their samples, at the activations of one micro-batch. With features f_k
of micro-batch k, parameters w and a loss L over all features, dL/dw = sum_k (dL/df_k) (df_k/dw):

    1. features of every micro-batch without a graph, the last one with; L and dL/df over all of them
    2. micro-batch by micro-batch: features again, now with a graph, and dL/df_k back through it

The last micro-batch keeps its graph from 1 to 2, so K micro-batches cost K - 1 forward passes of the student more. No
layer draws random numbers, so that both passes compute the same features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from cosmos_fast.config import ViewsConfig
from cosmos_fast.data.batch import Batch
from cosmos_fast.engine.joined_features import JoinedFeatures, join_teacher
from cosmos_fast.engine.loss_scale import LossScaler
from cosmos_fast.engine.precision import Precision
from cosmos_fast.loss import ClipLoss, CosmosLoss, CosmosLossOutput, TeacherAhead
from cosmos_fast.model import CosmosFeatures, CosmosModel, TeacherFeatures
from cosmos_fast.utils.phases import PhaseClock, no_clock


class Passes(Protocol):
    """The student's passes where something stands between it and autograd, such as DeepSpeed."""

    def forward(self, images: list[Tensor], texts_VBL: Tensor) -> CosmosFeatures:
        """As the student itself, in the precision of the run."""

    def backward(
        self, tensors: Sequence[Tensor], gradients: Sequence[Tensor] | None = None, *, last: bool = True
    ) -> None:
        """As torch.autograd.backward. last: of this optimizer step, on every rank."""


@dataclass
class Gradients:
    """Forward and backward of one optimizer step.

    Batches of another device move to the model's one at a time; those of data.Loader are there already. negatives: what
    a sample is held against, its micro-batch or all samples of the step. clock: told of every phase. scaler: of the
    loss; gradients come out too large by its factor. passes: None for the student's own.
    """

    student: CosmosModel
    teacher: CosmosModel
    objective: CosmosLoss | ClipLoss
    views: ViewsConfig
    precision: Precision
    negatives: Literal["micro", "all"] = "micro"
    clock: PhaseClock = no_clock
    scaler: LossScaler | None = None
    passes: Passes | None = None

    def accumulate(self, batches: Sequence[Batch]) -> Tensor:
        """Add the gradients of the step's loss to the student's parameters; returns [3]: clip, distill, total loss.

        The loss is the mean over the micro-batches, or, with all negatives, that of all their samples together.
        """
        if len(batches) > 1 and self.negatives == "all":
            return self._add_together(batches)
        count = len(batches)
        return torch.stack([self._add(batch, 1.0 / count, k == count) for k, batch in enumerate(batches, 1)]).sum(dim=0)

    def _add(self, batch: Batch, share: float, last: bool) -> Tensor:
        teacher = self._send(self._encode_teacher(batch))
        output = self._loss(self._encode(batch), teacher)
        with self.clock("backward"):
            self._run_back([self._scaled(output.total * share)], last=last)
        return _values(output) * share

    def _add_together(self, batches: Sequence[Batch]) -> Tensor:
        *early, last = batches
        teacher = self._send(join_teacher([self._encode_teacher(batch) for batch in batches]))
        with torch.no_grad():
            students = [self._encode(batch) for batch in early]
        students.append(self._encode(last))
        joined = JoinedFeatures(students)
        output = self._loss(joined.features, teacher)
        with self.clock("backward"):
            self._scaled(output.total).backward()  # down to the joined features
            joined.backward(students.pop(), len(early), partial(self._run_back, last=False))
        del students
        for k, batch in enumerate(early):
            features = self._encode(batch, phase="recompute")
            with self.clock("backward"):
                joined.backward(features, k, partial(self._run_back, last=k == len(early) - 1))
        return _values(output)

    def _encode(self, batch: Batch, phase: str = "student") -> CosmosFeatures:
        with self.clock(phase):
            batch = batch.to(self.student.logit_scale.device)
            if self.passes is not None:
                return self.passes.forward(batch.images, batch.texts)
            with self.precision.autocast():
                return self.student(batch.images, batch.texts)

    def _encode_teacher(self, batch: Batch) -> TeacherFeatures | None:
        """What the distillation term compares with; plain CLIP has no such term."""
        if isinstance(self.objective, ClipLoss):
            return None
        with self.clock("teacher"):
            batch = batch.to(self.student.logit_scale.device)
            images, texts = batch.images[: self.views.global_crops], batch.texts[: self.views.global_captions]
            with torch.inference_mode(), self.precision.autocast():
                features = self.teacher.encode_views(images, texts)
            # Copies: autograd refuses to keep tensors of inference mode for a backward pass, and the loss keeps these.
            return TeacherFeatures(features.image.clone(), features.text.clone())

    def _send(self, teacher: TeacherFeatures | None) -> TeacherFeatures | TeacherAhead | None:
        """To the other ranks, while the student works."""
        if teacher is None:
            return None
        with self.clock("teacher"), self.precision.autocast():
            return self.objective.ahead(teacher)

    def _loss(self, student: CosmosFeatures, teacher: TeacherFeatures | TeacherAhead | None) -> CosmosLossOutput:
        with self.clock("loss"), self.precision.autocast():
            return self.objective(student, teacher)

    def _run_back(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor] | None = None, *, last: bool) -> None:
        """The one place where gradients of the parameters come from."""
        if self.passes is None:
            torch.autograd.backward(tensors, gradients)
        else:
            self.passes.backward(tensors, gradients, last=last)

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scaled(loss)


def _values(output: CosmosLossOutput) -> Tensor:
    return torch.stack([output.clip, output.distill, output.total]).detach()
