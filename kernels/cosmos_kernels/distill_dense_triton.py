"""Soft-target cross-entropy of dense logits [M, K] in Triton: one read for the loss, one for the gradient.

    s = student / student_temperature,  t = teacher / teacher_temperature
    statistics: the state (see `distill_state`) of every row, by an online softmax over blocks of K
    gradient:   weight (exp(s - student_peak) / student_sum - exp(t - teacher_peak) / teacher_sum)

Shapes: student, teacher [M, K] in fp32, bf16 or fp16, each its own, rows at any stride; states [5, M] fp32; gradient
[M, K] in the student's dtype. All arithmetic is fp32. Bytes moved: student and teacher once in each of the two kernels,
the gradient once; a few numbers a row besides. With few rows, several programs share one, and their states are merged.

Checked in Triton's interpreter and compiled for sm_80/sm_90/sm_100; not yet run on hardware.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos_kernels import distill_state, triton_support
from cosmos_kernels.triton_support import AheadCase

MAX_BLOCK = 2048  # logits of a row at a time: with 4 warps, 16 a thread
MIN_PROGRAMS = 1024  # below this many rows, a row is shared: several programs for each of some 130 processors


@triton.jit
def _statistics_kernel(
    student_ptr,
    teacher_ptr,
    states_ptr,
    M,
    K,
    stride_student,
    stride_teacher,
    span,
    student_factor,
    teacher_factor,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, K)
    offs = tl.arange(0, BLOCK)
    # Finite, so that the first step multiplies zeros by a number.
    student_peak = -1e38
    teacher_peak = -1e38
    student_sum = tl.zeros((BLOCK,), tl.float32)
    teacher_sum = tl.zeros((BLOCK,), tl.float32)
    expected = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        mask = start + offs < last
        s = tl.load(student_ptr + row * stride_student + start + offs, mask=mask, other=-float("inf"))
        t = tl.load(teacher_ptr + row * stride_teacher + start + offs, mask=mask, other=-float("inf"))
        s = s.to(tl.float32) * student_factor
        t = t.to(tl.float32) * teacher_factor
        new_student_peak = tl.maximum(student_peak, tl.max(s, 0))
        new_teacher_peak = tl.maximum(teacher_peak, tl.max(t, 0))
        shift = student_peak - new_student_peak
        decay = tl.exp(teacher_peak - new_teacher_peak)
        s -= new_student_peak
        weights = tl.exp(t - new_teacher_peak)
        expected = decay * (expected + shift * teacher_sum) + tl.where(mask, weights * s, 0.0)
        student_sum = student_sum * tl.exp(shift) + tl.exp(s)
        teacher_sum = teacher_sum * decay + weights
        student_peak = new_student_peak
        teacher_peak = new_teacher_peak
    out_ptr = states_ptr + tl.program_id(1).to(tl.int64) * 5 * M + row
    tl.store(out_ptr, student_peak)
    tl.store(out_ptr + M, tl.sum(student_sum, 0))
    tl.store(out_ptr + 2 * M, teacher_peak)
    tl.store(out_ptr + 3 * M, tl.sum(teacher_sum, 0))
    tl.store(out_ptr + 4 * M, tl.sum(expected, 0))


@triton.jit
def _gradient_kernel(
    student_ptr,
    teacher_ptr,
    states_ptr,
    weight_ptr,
    grad_ptr,
    M,
    K,
    stride_student,
    stride_teacher,
    student_factor,
    teacher_factor,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < K
    weight = tl.load(weight_ptr)
    student_peak = tl.load(states_ptr + row)
    student_weight = weight / tl.load(states_ptr + M + row)
    teacher_peak = tl.load(states_ptr + 2 * M + row)
    teacher_weight = weight / tl.load(states_ptr + 3 * M + row)
    s = tl.load(student_ptr + row * stride_student + offs, mask=mask, other=0.0).to(tl.float32) * student_factor
    t = tl.load(teacher_ptr + row * stride_teacher + offs, mask=mask, other=0.0).to(tl.float32) * teacher_factor
    grad = tl.exp(s - student_peak) * student_weight - tl.exp(t - teacher_peak) * teacher_weight
    tl.store(grad_ptr + row * K + offs, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def dense_statistics(
    student_MK: Tensor, teacher_MK: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """States of the rows: [5, M] fp32."""
    student_MK, teacher_MK = _unit_stride(student_MK), _unit_stride(teacher_MK)
    rows, classes = student_MK.shape
    block = _block(classes)
    blocks = triton.cdiv(classes, block)
    blocks_each = triton.cdiv(blocks, min(blocks, triton.cdiv(MIN_PROGRAMS, rows)))
    splits = triton.cdiv(blocks, blocks_each)
    states = student_MK.new_empty((splits, distill_state.SIZE, rows), dtype=torch.float32)
    with triton_support.launch_device(student_MK):
        _statistics_kernel[(rows, splits)](
            student_MK,
            teacher_MK,
            states,
            rows,
            classes,
            student_MK.stride(0),
            teacher_MK.stride(0),
            blocks_each * block,
            1 / student_temperature,
            1 / teacher_temperature,
            BLOCK=block,
            num_warps=_warps(block),
        )
    return distill_state.merge(states)


def dense_gradient(
    student_MK: Tensor,
    teacher_MK: Tensor,
    row_states: Tensor,
    weight: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """weight (softmax(student) - softmax(teacher)): [M, K] in the student's dtype."""
    rows, classes = student_MK.shape
    dtype = torch.float32 if triton_support.upcast(student_MK.dtype) else student_MK.dtype
    grad_MK = torch.empty((rows, classes), dtype=dtype, device=student_MK.device)
    student, teacher = _unit_stride(student_MK), _unit_stride(teacher_MK)
    block = _block(classes)
    with triton_support.launch_device(student):
        _gradient_kernel[(rows, triton.cdiv(classes, block))](
            student,
            teacher,
            row_states.contiguous(),
            weight,
            grad_MK,
            rows,
            classes,
            student.stride(0),
            teacher.stride(0),
            1 / student_temperature,
            1 / teacher_temperature,
            BLOCK=block,
            num_warps=_warps(block),
        )
    return grad_MK.to(student_MK.dtype)


def _unit_stride(logits_MK: Tensor) -> Tensor:
    return logits_MK if logits_MK.stride(1) == 1 else logits_MK.contiguous()


def _block(classes: int) -> int:
    return min(MAX_BLOCK, triton.next_power_of_2(classes))


def _warps(block: int) -> int:
    return 4 if block >= 512 else 1


_SIZES = {"M": "i32", "K": "i32", "stride_student": "i32", "stride_teacher": "i32"}
_FACTORS = {"student_factor": "fp32", "teacher_factor": "fp32"}

COMPILE_AHEAD = [
    AheadCase(
        name=f"{name}/{dtype}",
        kernel=kernel,
        signature={"student_ptr": f"*{dtype}", "teacher_ptr": f"*{dtype}", **pointers, **_SIZES, **span, **_FACTORS},
        constexprs={"BLOCK": MAX_BLOCK},
        divisible_by_16=("M", "K", "stride_student", "stride_teacher", *span),
    )
    for dtype in ("bf16", "fp32")
    for name, kernel, pointers, span in (
        ("statistics", _statistics_kernel, {"states_ptr": "*fp32"}, {"span": "i32"}),
        (
            "gradient",
            _gradient_kernel,
            {"states_ptr": "*fp32", "weight_ptr": "*fp32", "grad_ptr": f"*{dtype}"},
            {},
        ),
    )
]
