"""The eager port as torch.compile and the library's own fused parts make it: the second baseline of a whole step.

Same arithmetic, same order. Compiled: student, teacher, and each of the 80 pairwise losses. Causal attention is asked
for by name instead of by a float mask, so that the flash kernel may serve; AdamW is fused, the teacher's average one
call over all tensors.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.eager_cosmos import EagerCosmos, EagerFeatures, EagerTrainer, infonce, parameter_groups
from benchmarks.eager_cosmos.step import GLOBAL_VIEWS, Gather


class CompiledTrainer(EagerTrainer):
    """Takes minutes to compile on its first step."""

    def __init__(
        self,
        student: EagerCosmos,
        *,
        weight_decay: float = 0.5,
        ema_decay: float = 0.999,
        precision: str = "fp32",
        gather: Gather | None = None,
    ) -> None:
        super().__init__(student, weight_decay=weight_decay, ema_decay=ema_decay, precision=precision, gather=gather)
        groups = parameter_groups(student, weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-8, fused=True)
        for model in (self.student, self.teacher):
            _ask_for_causal_attention(model)
        self._student = torch.compile(self.student)
        self._teacher = torch.compile(self.teacher)
        self.pair_loss = torch.compile(infonce)

    def forward_teacher(self, images: list[Tensor], texts_VBL: Tensor) -> EagerFeatures:
        with torch.no_grad(), self.autocast():
            return self._teacher(images[:GLOBAL_VIEWS], texts_VBL[:GLOBAL_VIEWS], crossmodal=False)

    def forward_student(self, images: list[Tensor], texts_VBL: Tensor) -> EagerFeatures:
        with self.autocast():
            return self._student(images, texts_VBL)

    @torch.no_grad()
    def update_teacher(self) -> None:
        ours, theirs = list(self.teacher.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - self.ema_decay)


def _ask_for_causal_attention(model: EagerCosmos) -> None:
    for block in model.transformer.resblocks:
        attention = block.attn
        assert isinstance(attention, nn.MultiheadAttention)
        attention.forward = partial(attention.forward, is_causal=True)  # type: ignore[method-assign]
