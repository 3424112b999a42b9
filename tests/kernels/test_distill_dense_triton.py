"""The Triton kernels of dense distillation against fp64 truth; in the interpreter where there is no GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from cosmos_fast.ops import dense_distillation_cross_entropy
from cosmos_kernels import distill_dense_triton, reference
from tests.kernels.truth import assert_no_worse, outcome

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Several blocks a program and several programs a row, at sizes the interpreter can bear."""
    monkeypatch.setattr(distill_dense_triton, "MAX_BLOCK", 64)
    monkeypatch.setattr(distill_dense_triton, "MIN_PROGRAMS", 12)


def _logits(rows: int, classes: int, device: str, spread: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows + classes)
    drawn = (spread * torch.randn(rows, classes, generator=generator) for _ in range(2))
    return {name: x.to(device) for name, x in zip(("student_logits_MK", "teacher_logits_MK"), drawn, strict=True)}


def _check(inputs: dict[str, Tensor], *temperatures: float) -> None:
    def eager(student_logits_MK: Tensor, teacher_logits_MK: Tensor) -> Tensor:
        return reference.dense_distillation_cross_entropy(student_logits_MK, teacher_logits_MK, *temperatures)

    def triton(student_logits_MK: Tensor, teacher_logits_MK: Tensor) -> Tensor:
        return dense_distillation_cross_entropy(student_logits_MK, teacher_logits_MK, *temperatures, backend="triton")

    judged = partial(outcome, inputs=inputs, without_gradient=("teacher_logits_MK",))
    found = judged(triton)
    assert found.outputs["output 0"].dtype == torch.float32
    assert found.gradients["student_logits_MK"].dtype == inputs["student_logits_MK"].dtype
    assert_no_worse(found, judged(eager), judged(eager, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (3, 65), (9, 256), (20, 100)])
def test_shapes_and_dtypes(shape, dtype, device):
    _check({name: x.to(dtype) for name, x in _logits(*shape, device).items()}, 1.0, 1.0)


@pytest.mark.parametrize("spread", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("temperatures", [(0.1, 0.04), (4.0, 0.5)])
def test_temperatures_and_spreads(temperatures, spread, device):
    _check(_logits(5, 300, device, spread), *temperatures)


def test_dtypes_that_differ(device):
    inputs = _logits(5, 130, device)
    _check({**inputs, "teacher_logits_MK": inputs["teacher_logits_MK"].half()}, 1.0, 0.5)


def test_strides(device):
    inputs = {
        "student_logits_MK": torch.randn(6, 140, device=device)[:, :90],
        "teacher_logits_MK": torch.randn(90, 6, device=device).T,
    }
    _check(inputs, 1.0, 1.0)


def test_classes_excluded_by_the_teacher_fill_a_whole_program(device):
    inputs = _logits(2, 600, device)
    inputs["teacher_logits_MK"][:, 64:400] = -torch.inf
    inputs["teacher_logits_MK"][1, :590] = -torch.inf
    _check(inputs, 1.0, 1.0)


@pytest.mark.parametrize("name", ["student_logits_MK", "teacher_logits_MK"])
def test_nan_in_gives_nan_out(name, device):
    inputs = _logits(4, 300, device)
    inputs[name][1, 77] = torch.nan
    student = inputs["student_logits_MK"].requires_grad_()
    loss = dense_distillation_cross_entropy(student, inputs["teacher_logits_MK"], backend="triton")
    loss.backward()
    assert loss.isnan()
    assert student.grad[1].isnan().all()
    assert student.grad[[0, 2, 3]].isfinite().all()


def test_fp64_is_refused(device):
    logits = torch.zeros(2, 3, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="'triton' was asked for but cannot run: it takes fp32, bf16 and fp16"):
        dense_distillation_cross_entropy(logits, logits, backend="triton")
