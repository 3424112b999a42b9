"""Soft-target cross-entropy of dense logits [M, K], as in DINO-style self-distillation: two reads, one write.

    q = softmax(student / student_temperature), p = softmax(teacher / teacher_temperature), over K
    loss = mean_m  -sum_k p log q            d loss / d student = (q - p) / (student_temperature M)

Forward reads both matrices once (online softmax) and keeps five numbers a row (`cosmos_kernels.distill_state`);
backward reads them once more and writes the gradient. Nothing else of size M x K exists. The teacher gets no gradient.

Stages of a backend: `dense_statistics(student, teacher, student_temperature, teacher_temperature)` and
`dense_gradient(student, teacher, row_states, weight, student_temperature, teacher_temperature)`.

Axes: M rows, K classes.
"""

from __future__ import annotations

import math
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from cosmos_fast.ops import distill_tiled
from cosmos_fast.ops.backends import Backend, register, stages_for
from cosmos_fast.ops.distill import why_not_in_triton
from cosmos_kernels import distill_state, reference, triton_support

NAME = "dense_distillation_cross_entropy"


def dense_distillation_cross_entropy(
    student_logits_MK: Tensor,
    teacher_logits_MK: Tensor,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Mean over the rows of the cross-entropy of the teacher's softmax (targets) and the student's.

    Args:
        student_logits_MK: [M, K]; fp64, fp32, bf16 or fp16.
        teacher_logits_MK: [M, K], same device; its dtype may differ. Gets no gradient; -inf excludes a class.
        student_temperature, teacher_temperature: positive divisors of the logits.
        backend: "auto", "tiled", "triton" or "eager" (the oracle).

    Returns:
        Scalar loss in fp32 (fp64 for fp64 input). The student's gradient comes in the student's dtype. Deterministic.

    Raises:
        ValueError: shapes, dtypes, devices or temperatures that do not fit, or a backend that cannot run.
    """
    temperatures = float(student_temperature), float(teacher_temperature)
    _check_arguments(student_logits_MK, teacher_logits_MK, temperatures)
    teacher_logits_MK = teacher_logits_MK.detach()
    if backend == "eager":
        return _run_eager(student_logits_MK, teacher_logits_MK, *temperatures)
    return _DenseDistillation.apply(student_logits_MK, teacher_logits_MK, *temperatures, backend)


class _DenseDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_MK: Tensor,
        teacher_MK: Tensor,
        student_temperature: float,
        teacher_temperature: float,
        backend: str,
    ) -> Tensor:
        ctx.options = student_temperature, teacher_temperature, backend
        row_states = torch.ops.cosmos_fast.dense_distill_statistics(student_MK, teacher_MK, *ctx.options)
        ctx.save_for_backward(student_MK, teacher_MK, row_states)
        return distill_state.cross_entropy(row_states).mean()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        student_MK, teacher_MK, row_states = ctx.saved_tensors
        weight = grad_loss / (ctx.options[0] * student_MK.shape[0])
        grad_MK = torch.ops.cosmos_fast.dense_distill_gradient(student_MK, teacher_MK, row_states, weight, *ctx.options)
        return grad_MK, *(None,) * 4


_OPTIONS = "float student_temperature, float teacher_temperature, str backend"


@torch.library.custom_op(
    "cosmos_fast::dense_distill_statistics",
    mutates_args=(),
    schema=f"(Tensor student, Tensor teacher, {_OPTIONS}) -> Tensor",
)
def _statistics(*arguments: Any) -> Tensor:
    *inputs, backend = arguments
    return _stages(backend, inputs).dense_statistics(*inputs)


@_statistics.register_fake
def _(student: Tensor, teacher: Tensor, *_: Any) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.new_empty((distill_state.SIZE, student.shape[0]), dtype=dtype)


@torch.library.custom_op(
    "cosmos_fast::dense_distill_gradient",
    mutates_args=(),
    schema=f"(Tensor student, Tensor teacher, Tensor row_states, Tensor weight, {_OPTIONS}) -> Tensor",
)
def _gradient(*arguments: Any) -> Tensor:
    *inputs, backend = arguments
    return _stages(backend, inputs).dense_gradient(*inputs)


@_gradient.register_fake
def _(student: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _stages(backend: str, inputs: list[Any]) -> Any:
    return stages_for(NAME, backend, *inputs[:2])


def _run_eager(student_MK: Tensor, teacher_MK: Tensor, *temperatures: float) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(student_MK.dtype, teacher_MK.dtype), torch.float32)
    with torch.autocast(student_MK.device.type, enabled=False):
        return reference.dense_distillation_cross_entropy(student_MK.to(dtype), teacher_MK.to(dtype), *temperatures)


def _check_arguments(student_MK: Tensor, teacher_MK: Tensor, temperatures: tuple[float, float]) -> None:
    for label, logits in (("student_logits_MK", student_MK), ("teacher_logits_MK", teacher_MK)):
        if logits.dim() != 2 or 0 in logits.shape:
            raise ValueError(f"{NAME}: {label} has shape {tuple(logits.shape)}, expected non-empty [M, K]")
        if not logits.is_floating_point():
            raise ValueError(f"{NAME}: {label} has dtype {logits.dtype}, expected a floating-point dtype")
    if teacher_MK.shape != student_MK.shape:
        raise ValueError(
            f"{NAME}: teacher_logits_MK has shape {tuple(teacher_MK.shape)}, expected {tuple(student_MK.shape)} "
            "like student_logits_MK"
        )
    if teacher_MK.device != student_MK.device:
        raise ValueError(
            f"{NAME}: teacher_logits_MK is on {teacher_MK.device}, student_logits_MK on {student_MK.device}"
        )
    for label, temperature in zip(("student_temperature", "teacher_temperature"), temperatures, strict=True):
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"{NAME}: {label} is {temperature}, expected a positive number")


register(
    Backend(
        NAME,
        "triton",
        load=partial(import_module, "cosmos_kernels.distill_dense_triton"),
        summary="two reads of the logits and one write; not yet run on hardware",
        why_unavailable=triton_support.why_missing,
        why_unsupported=why_not_in_triton,
    ),
    Backend(NAME, "tiled", distill_tiled, "PyTorch, a few rows at a time"),
    Backend(NAME, "eager", _run_eager, "the oracle", automatic=False),
)
