"""One training step in the original's order: forward, backward, teacher, optimizer, clamp."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.eager_cosmos.loss import GLOBAL_VIEWS, EagerLosses, PairLoss, cosmos_loss, infonce
from benchmarks.eager_cosmos.model import EagerCosmos, EagerFeatures

MAX_LOG_SCALE = math.log(100)
Gather = Callable[[EagerFeatures, EagerFeatures, int], tuple[EagerFeatures, EagerFeatures, int]]
NO_DECAY_NAMES = ("bn", "ln", "bias", "logit_scale")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """No decay for parameters of fewer than two axes, or whose name contains one of `NO_DECAY_NAMES`."""

    def is_plain(name: str, parameter: Tensor) -> bool:
        return parameter.ndim < 2 or any(part in name for part in NO_DECAY_NAMES)

    named = list(model.named_parameters())
    plain = [parameter for name, parameter in named if is_plain(name, parameter)]
    decayed = [parameter for name, parameter in named if not is_plain(name, parameter)]
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def learning_rate(step: int, base: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up that is not zero at step 0, then half a cosine to zero."""
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress)) * base


class EagerTrainer:
    """Student, teacher and optimizer. `step` is `phases` run to its end; a profiler times the phases one by one."""

    def __init__(
        self,
        student: EagerCosmos,
        *,
        weight_decay: float = 0.5,
        ema_decay: float = 0.999,
        precision: str = "fp32",
        gather: Gather | None = None,
    ) -> None:
        """precision: "fp32", or "bf16" for forward and loss under autocast as the original's `amp_bf16`. gather: what
        other ranks add to the features before the loss, and how many samples there are then; None is one rank."""
        self.student = student
        device = student.logit_scale.device.type
        self.autocast = partial(torch.autocast, device, dtype=torch.bfloat16, enabled=precision == "bf16")
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        groups = parameter_groups(student, weight_decay)
        # The default implementation for the device: a Python loop on a CPU, foreach on CUDA.
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-8)
        self.ema_decay = ema_decay
        self.gather = gather
        self.pair_loss: PairLoss = infonce
        self.losses: EagerLosses | None = None

    def step(self, images: list[Tensor], texts_VBL: Tensor, lr: float) -> EagerLosses:
        """V crops [B, 3, H, W], captions [V, B, L]; returns the losses before the update."""
        for _ in self.phases(images, texts_VBL, lr):
            pass
        assert self.losses is not None
        return self.losses

    def forward_teacher(self, images: list[Tensor], texts_VBL: Tensor) -> EagerFeatures:
        with torch.no_grad(), self.autocast():
            return self.teacher(images[:GLOBAL_VIEWS], texts_VBL[:GLOBAL_VIEWS], crossmodal=False)

    def forward_student(self, images: list[Tensor], texts_VBL: Tensor) -> EagerFeatures:
        with self.autocast():
            return self.student(images, texts_VBL)

    def compute_losses(self, student: EagerFeatures, teacher: EagerFeatures, batch: int) -> EagerLosses:
        """Of [V*B, D] features with B = `batch`, or of more samples where `gather` adds them."""
        if self.gather is not None:
            student, teacher, batch = self.gather(student, teacher, batch)
        with self.autocast():
            return cosmos_loss(student, teacher, batch, self.pair_loss)

    def phases(self, images: list[Tensor], texts_VBL: Tensor, lr: float) -> Iterator[str]:
        """Run a step, yielding the name of each phase after it."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        texts_VBL = texts_VBL.to(images[0].device, non_blocking=True)
        teacher = self.forward_teacher(images, texts_VBL)
        yield "teacher"
        student = self.forward_student(images, texts_VBL)
        yield "student"
        self.losses = self.compute_losses(student, teacher, texts_VBL.shape[1])
        yield "loss"
        self.losses.total.backward()
        yield "backward"
        self.update_teacher()
        self.optimizer.step()
        self.clamp_scales()
        yield "optimizer"

    @torch.no_grad()
    def update_teacher(self) -> None:
        """teacher <- m * teacher + (1 - m) * student, with the student's weights from before the update."""
        for ours, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            ours.data.mul_(self.ema_decay).add_((1 - self.ema_decay) * theirs.detach().data)

    @torch.no_grad()
    def clamp_scales(self) -> None:
        for model in (self.student, self.teacher):
            model.logit_scale.clamp_(0, MAX_LOG_SCALE)
            model.distill_logit_scale.clamp_(0, MAX_LOG_SCALE)
