"""Soft-target distillation cross-entropy between two similarity matrices, no matrix stored.

Student logits s = student_scale <a_i, b_j>, teacher logits t = teacher_scale <a'_i, b'_j>, of every pair of views; q
and p are their softmaxes over the columns j (r) and over the rows i (c):

    loss = mean over pairs of  1/2 [ mean_i  -sum_j p_r log q_r  +  mean_j  -sum_i p_c log q_c ]
    dL/ds = (q_r - p_r) / (2 pairs B) + (q_c - p_c) / (2 pairs G)

Forward keeps five numbers a row and a column (`cosmos_kernels.distill_state`); backward recomputes the logits. The
teacher gets no gradient. This is the objective of OpenCLIP's distillation; it is an option, not part of COSMOS.

Stages of a backend: `statistics(student_a, student_b, teacher_a, teacher_b, student_scale, teacher_scale)` and
`feature_gradients(those six, row_states, column_states, row_weight, column_weight, want_a, want_b)`.

Axes: Va, Vb views, B rows, G columns, D embedding.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from cosmos_fast.ops import distill_tiled
from cosmos_fast.ops.backends import Backend, register, stages_for
from cosmos_kernels import distill_state, reference, triton_support

NAME = "distillation_cross_entropy"


def distillation_cross_entropy(
    student_a: Tensor,
    student_b: Tensor,
    teacher_a: Tensor,
    teacher_b: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of the teacher's and the student's softmax over similarities, both directions, mean of all pairs.

    With one view this is the distillation term of OpenCLIP's DistillClipLoss: a image features, b text features.

    Args:
        student_a: [Va, B, D] features, usually L2-normalised, or [B, D] for one view; fp64, fp32, bf16 or fp16.
        student_b: [Vb, G, D] or [G, D], same dtype and device. B and G need not be equal.
        teacher_a, teacher_b: [Va or 1, B, D'] and [Vb or 1, G, D'] or without views; one view serves all of the
            student's. Their D' and dtype may differ from the student's. They get no gradient.
        student_scale, teacher_scale: scalar tensors, exponentiated temperatures; the student's gets a gradient.
        backend: "auto", "tiled", "triton" or "eager" (the oracle, which stores every matrix).

    Returns:
        Scalar loss in fp32 (fp64 for fp64 input). Deterministic.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a backend that cannot run.
    """
    features = [x.unsqueeze(0) if x.dim() == 2 else x for x in (student_a, student_b, teacher_a, teacher_b)]
    _check_arguments(features, student_scale, teacher_scale)
    teacher = features[2].detach(), features[3].detach(), teacher_scale.detach()
    if backend == "eager":
        return _run_eager(features[0], features[1], teacher[0], teacher[1], student_scale, teacher[2])
    return _Distillation.apply(features[0], features[1], student_scale, *teacher, backend)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a_VBD: Tensor,
        b_VGD: Tensor,
        scale: Tensor,
        teacher_a_VBD: Tensor,
        teacher_b_VGD: Tensor,
        teacher_scale: Tensor,
        backend: str,
    ) -> Tensor:
        inputs = (a_VBD, b_VGD, teacher_a_VBD, teacher_b_VGD, scale, teacher_scale)
        row_states, column_states = torch.ops.cosmos_fast.distill_statistics(*inputs, backend)
        ctx.save_for_backward(*inputs, row_states, column_states)
        ctx.backend = backend
        return (distill_state.cross_entropy(row_states).mean() + distill_state.cross_entropy(column_states).mean()) / 2

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        a_VBD, b_VGD, *others = ctx.saved_tensors
        want_a, want_b, want_scale = ctx.needs_input_grad[:3]
        pairs, batch, total = a_VBD.shape[0] * b_VGD.shape[0], a_VBD.shape[1], b_VGD.shape[1]
        # The larger of the two weights is 1: kernels may hold the matrix of gradients in 16 bits.
        common = min(batch, total)
        want_a = want_a or (want_scale and not want_b)
        grad_a, grad_b = torch.ops.cosmos_fast.distill_feature_gradients(
            a_VBD, b_VGD, *others, common / batch, common / total, want_a, want_b, ctx.backend
        )
        weight = grad_loss / (2 * pairs * common)
        scale = others[2]
        # d loss / d scale = sum of (d loss / d s) s / scale = <d loss / d a, a> / scale: no pass over the logits.
        grad_x, x = (grad_a, a_VBD) if want_a else (grad_b, b_VGD)
        grad_scale = (weight * (grad_x * x).sum()).to(scale.dtype) if want_scale else None
        factor = weight * scale.to(weight.dtype)
        return (
            (grad_a * factor).to(a_VBD.dtype) if ctx.needs_input_grad[0] else None,
            (grad_b * factor).to(b_VGD.dtype) if want_b else None,
            grad_scale,
            *(None,) * 4,
        )


_FEATURES = "Tensor student_a, Tensor student_b, Tensor teacher_a, Tensor teacher_b"
_INPUTS = f"{_FEATURES}, Tensor student_scale, Tensor teacher_scale"


@torch.library.custom_op(
    "cosmos_fast::distill_statistics", mutates_args=(), schema=f"({_INPUTS}, str backend) -> (Tensor, Tensor)"
)
def _statistics(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = arguments
    with torch.autocast(inputs[0].device.type, enabled=False):
        return _stages(backend, inputs).statistics(*inputs)


@_statistics.register_fake
def _(student_a: Tensor, student_b: Tensor, teacher_a: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    (row_views, batch, _), (column_views, total, _) = student_a.shape, student_b.shape
    dtype = torch.promote_types(torch.promote_types(student_a.dtype, teacher_a.dtype), torch.float32)
    row_states = student_a.new_empty((distill_state.SIZE, row_views, batch, column_views), dtype=dtype)
    return row_states, row_states.new_empty(distill_state.SIZE, row_views, column_views, total)


@torch.library.custom_op(
    "cosmos_fast::distill_feature_gradients",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor row_states, Tensor column_states, float row_weight, float column_weight, "
    "bool want_a, bool want_b, str backend) -> (Tensor, Tensor)",
)
def _feature_gradients(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = arguments
    with torch.autocast(inputs[0].device.type, enabled=False):
        return _stages(backend, inputs[:6]).feature_gradients(*inputs)


@_feature_gradients.register_fake
def _(student_a: Tensor, student_b: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    want_a, want_b, _ = others[-3:]
    dtype = torch.promote_types(student_a.dtype, torch.float32)
    grad_a = student_a.new_empty(student_a.shape if want_a else (0,), dtype=dtype)
    grad_b = student_b.new_empty(student_b.shape if want_b else (0,), dtype=dtype)
    return grad_a, grad_b


def _stages(backend: str, inputs: list[Tensor]) -> Any:
    return stages_for(NAME, backend, *inputs)


def why_not_in_triton(*inputs: Tensor) -> str | None:
    """None where the Triton kernels of distillation can take these tensors."""
    if any(x.dtype == torch.float64 for x in inputs):
        return "it takes fp32, bf16 and fp16, not fp64"
    return triton_support.why_not_on(*inputs)


def _run_eager(*inputs: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(inputs[0].dtype, inputs[2].dtype), torch.float32)
    with torch.autocast(inputs[0].device.type, enabled=False):
        return reference.distillation_cross_entropy(*(x.to(dtype) for x in inputs))


def _check_arguments(features: list[Tensor], student_scale: Tensor, teacher_scale: Tensor) -> None:
    """Features are [views, batch, D] here; see the public function for what must fit."""
    student_a, student_b, teacher_a, teacher_b = features
    for label, x in zip(("student_a", "student_b", "teacher_a", "teacher_b"), features, strict=True):
        if x.dim() != 3 or 0 in x.shape:
            raise ValueError(f"{NAME}: {label} has shape {tuple(x.shape)}, expected non-empty [views, batch, D]")
        if not x.is_floating_point():
            raise ValueError(f"{NAME}: {label} has dtype {x.dtype}, expected a floating-point dtype")
        if x.device != student_a.device:
            raise ValueError(f"{NAME}: {label} is on {x.device}, expected {student_a.device} like student_a")
    for side, a, b in (("student", student_a, student_b), ("teacher", teacher_a, teacher_b)):
        if a.shape[2] != b.shape[2] or a.dtype != b.dtype:
            raise ValueError(
                f"{NAME}: {side}_b has shape {tuple(b.shape)} and is {b.dtype}, "
                f"expected [views, batch, {a.shape[2]}] and {a.dtype} like {side}_a"
            )
    for label, teacher, student in (("a", teacher_a, student_a), ("b", teacher_b, student_b)):
        views, batch = student.shape[:2]
        if teacher.shape[1] != batch or teacher.shape[0] not in (1, views):
            expected = f"[1 or {views}, {batch}, D]" if views > 1 else f"[1, {batch}, D]"
            raise ValueError(
                f"{NAME}: teacher_{label} has shape {tuple(teacher.shape)}, expected {expected} like student_{label}"
            )
    for label, scale in (("student_scale", student_scale), ("teacher_scale", teacher_scale)):
        if scale.dim() != 0:
            raise ValueError(f"{NAME}: {label} has shape {tuple(scale.shape)}, expected a scalar tensor")
        if not scale.is_floating_point() or scale.device != student_a.device:
            raise ValueError(
                f"{NAME}: {label} is {scale.dtype} on {scale.device}, expected a float on {student_a.device}"
            )


register(
    Backend(
        NAME,
        "triton",
        load=partial(import_module, "cosmos_kernels.distill_triton"),
        summary="one pass for rows and columns, gradients by library products; not yet run on hardware",
        why_unavailable=triton_support.why_missing,
        why_unsupported=why_not_in_triton,
    ),
    Backend(NAME, "tiled", distill_tiled, "PyTorch, tile by tile; no logits stored"),
    Backend(NAME, "eager", _run_eager, "the oracle: every pair by itself", automatic=False),
)
