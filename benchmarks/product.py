"""The product's training step, with the interface of `eager_cosmos.EagerTrainer`, so that both can be timed alike.

Axes: B batch, V views, L tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cosmos_fast.config import ComputeConfig, OptimizerConfig, TrainConfig
from cosmos_fast.engine.optimizer import build_optimizer
from cosmos_fast.loss import CosmosLoss, CosmosLossOutput
from cosmos_fast.model import CosmosFeatures, CosmosModel, TeacherFeatures, create_model
from cosmos_fast.model.compute import apply_compute

GLOBAL_VIEWS = 2
Criterion = Callable[[CosmosFeatures, TeacherFeatures], CosmosLossOutput]


def made_on(device: str) -> torch.device:
    """Within it, models draw their weights there; on the host that takes longer than a few steps on a GPU."""
    return torch.empty(0, device=device).device  # asked, because the rehearsal's "cuda" is the CPU


class ProductTrainer:
    """Student, teacher, loss and optimizer of `cosmos_fast`, without what the engine does between steps."""

    def __init__(
        self,
        student: CosmosModel,
        *,
        weight_decay: float = 0.5,
        ema_decay: float = 0.999,
        precision: str = "fp32",
        compute: ComputeConfig | None = None,
        criterion: Criterion | None = None,
    ) -> None:
        """compute: as in a run's configuration. criterion: the loss, `CosmosLoss()` if not given."""
        compute = compute or ComputeConfig()
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        for model in (self.student, self.teacher):
            apply_compute(model, compute, student.logit_scale.device)
        self.criterion = criterion or CosmosLoss()
        optimizer = OptimizerConfig(weight_decay=weight_decay)
        config = TrainConfig(name="bench", model=student.config, optimizer=optimizer, compute=compute)
        self.optimizer = build_optimizer(config, self.student, self.teacher)
        self.ema_decay = ema_decay
        device = student.logit_scale.device.type
        self.autocast = partial(torch.autocast, device, dtype=torch.bfloat16, enabled=precision == "bf16")
        self.losses: CosmosLossOutput | None = None

    @classmethod
    def create(
        cls,
        openclip: dict[str, Any],
        *,
        device: str,
        precision: str,
        weights: dict[str, Tensor] | None = None,
        compute: ComputeConfig | None = None,
        criterion: Criterion | None = None,
    ) -> ProductTrainer:
        """A trainer of this architecture. weights: of student and teacher, under the original's names."""
        with made_on(device):
            student = create_model(openclip)
        if weights is not None:
            student.load_reference_state_dict(weights)
        return cls(student, precision=precision, compute=compute, criterion=criterion)

    def step(self, images: list[Tensor], texts_VBL: Tensor, lr: float) -> CosmosLossOutput:
        """V crops [B, 3, H, W], captions [V, B, L]; returns the losses before the update."""
        for _ in self.phases(images, texts_VBL, lr):
            pass
        assert self.losses is not None
        return self.losses

    def phases(self, images: list[Tensor], texts_VBL: Tensor, lr: float) -> Iterator[str]:
        """Run a step, yielding the name of each phase after it."""
        self.optimizer.zero_grad()
        with torch.inference_mode(), self.autocast():
            teacher = self.teacher.encode_views(images[:GLOBAL_VIEWS], texts_VBL[:GLOBAL_VIEWS])
        teacher = TeacherFeatures(teacher.image.clone(), teacher.text.clone())  # as the engine does, for the loss
        yield "teacher"
        with self.autocast():
            student = self.student(images, texts_VBL)
        yield "student"
        self.losses = self.criterion(student, teacher)
        yield "loss"
        self.losses.total.backward()
        yield "backward"
        result = self.optimizer.step(lr=lr, ema_decay=self.ema_decay, loss=self.losses.total)
        assert result.applied, "a loss or gradient was not finite"
        yield "optimizer"
