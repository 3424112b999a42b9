"""Distillation of dense logits against the oracle: values, gradients, memory, compiler, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cosmos_fast.ops import dense_distillation_cross_entropy, distill_tiled
from cosmos_kernels import reference

SHAPES = [(1, 1), (1, 9), (7, 1), (5, 33), (64, 100)]


def _logits(
    rows: int, classes: int, dtype: torch.dtype = torch.float64, spread: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = (spread * torch.randn(rows, classes, dtype=torch.float64) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def _value_and_gradient(run, student: torch.Tensor, *others) -> tuple[torch.Tensor, torch.Tensor]:
    loss = run(student, *others)
    return loss, torch.autograd.grad(loss, student)[0]


def _assert_same(actual, expected, **tolerance: float) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.1, 0.04), (5.0, 0.5)])
def test_oracle_is_the_cross_entropy_with_soft_targets(temperatures):
    torch.manual_seed(0)
    student, teacher = _logits(6, 11)
    expected = F.cross_entropy(student / temperatures[0], (teacher / temperatures[1]).softmax(1))
    torch.testing.assert_close(reference.dense_distillation_cross_entropy(student, teacher, *temperatures), expected)


@pytest.mark.parametrize("tile_elements", [distill_tiled.TILE_ELEMENTS, 70])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.1, 0.04), (1e-3, 1e-3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_oracle(monkeypatch, shape, temperatures, tile_elements):
    monkeypatch.setattr(distill_tiled, "TILE_ELEMENTS", tile_elements)
    torch.manual_seed(sum(shape))
    inputs = (*_logits(*shape), *temperatures)
    expected = _value_and_gradient(reference.dense_distillation_cross_entropy, *inputs)
    _assert_same(_value_and_gradient(dense_distillation_cross_entropy, *inputs), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["tiled", "eager"])
def test_gradcheck(backend):
    torch.manual_seed(0)
    student, teacher = _logits(3, 7)
    assert torch.autograd.gradcheck(
        lambda x: dense_distillation_cross_entropy(x, teacher, 0.7, 0.3, backend=backend), student
    )


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float16, torch.float32), (torch.float32,) * 2])
def test_low_precision_inputs_are_summed_in_fp32(dtypes):
    torch.manual_seed(1)
    student, teacher = _logits(16, 300, dtypes[0])
    teacher = teacher.to(dtypes[1])
    truth = _value_and_gradient(
        lambda x: reference.dense_distillation_cross_entropy(x.double(), teacher.double(), 0.5, 0.2), student
    )
    loss, gradient = _value_and_gradient(dense_distillation_cross_entropy, student, teacher, 0.5, 0.2)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtypes[0]
    torch.testing.assert_close(loss.double(), truth[0], rtol=1e-6, atol=0)
    rounding = max(torch.finfo(dtypes[0]).eps, 1e-6)
    assert (gradient.double() - truth[1].double()).abs().max() <= rounding * truth[1].abs().max()


def test_classes_excluded_by_the_teacher():
    torch.manual_seed(0)
    student, teacher = _logits(4, 20)
    teacher[:, 3:9] = -torch.inf
    expected = _value_and_gradient(reference.dense_distillation_cross_entropy, student, teacher)
    assert expected[0].isfinite()
    _assert_same(_value_and_gradient(dense_distillation_cross_entropy, student, teacher), expected)


@pytest.mark.parametrize("index", [0, 1])
def test_nan_in_gives_nan_out(index):
    student, teacher = _logits(4, 9, torch.float32)
    with torch.no_grad():
        (student, teacher)[index][1, 2] = float("nan")
    loss, gradient = _value_and_gradient(dense_distillation_cross_entropy, student, teacher)
    assert loss.isnan()
    assert gradient[1].isnan().all()
    assert gradient[0].isfinite().all()


def test_teacher_gets_no_gradient():
    student, teacher = _logits(4, 9)
    teacher.requires_grad_()
    dense_distillation_cross_entropy(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_non_contiguous_inputs():
    torch.manual_seed(0)
    student = torch.randn(11, 6, dtype=torch.float64).T.requires_grad_()
    teacher = torch.randn(6, 22, dtype=torch.float64)[:, ::2]
    expected = _value_and_gradient(reference.dense_distillation_cross_entropy, student, teacher)
    _assert_same(_value_and_gradient(dense_distillation_cross_entropy, student, teacher), expected)


def test_nothing_of_the_logits_size_beyond_inputs_and_gradient(monkeypatch):
    monkeypatch.setattr(distill_tiled, "TILE_ELEMENTS", 4096)
    rows, classes = 64, 1024
    student, teacher = _logits(rows, classes, torch.float32)
    saved: list[torch.Tensor] = []
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(out.numel() for out in [out] if isinstance(out, torch.Tensor) and func.namespace == "aten")
            return out

    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t), Watch():
        dense_distillation_cross_entropy(student, teacher).backward()
    pointers = (student.data_ptr(), teacher.data_ptr())
    assert sum(t.nbytes for t in saved if t.data_ptr() not in pointers) == 5 * 4 * rows
    # the gradient, and what autograd does with it (detach); every other tensor is a few rows
    assert {numel for numel in made if numel > 4096} <= {rows * classes}
    assert sum(numel > 4096 for numel in made) <= 3


def test_stage_operations_are_sound():
    student, teacher = (x.detach() for x in _logits(5, 12, torch.float32))
    inputs, options = (student, teacher.bfloat16()), (0.5, 0.1, "tiled")
    torch.library.opcheck(torch.ops.cosmos_fast.dense_distill_statistics.default, (*inputs, *options))
    states = torch.ops.cosmos_fast.dense_distill_statistics(*inputs, *options)
    torch.library.opcheck(
        torch.ops.cosmos_fast.dense_distill_gradient.default, (*inputs, states, torch.tensor(0.25), *options)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t: (s[0], t), r"student_logits_MK has shape \(9,\), expected non-empty \[M, K\]"),
        (lambda s, t: (s[:0], t[:0]), r"student_logits_MK has shape \(0, 9\), expected non-empty"),
        (lambda s, t: (s, t[:, :8]), r"teacher_logits_MK has shape \(4, 8\), expected \(4, 9\)"),
        (lambda s, t: (s, t.long()), "teacher_logits_MK has dtype torch.int64, expected a floating-point"),
        (lambda s, t: (s, t.to("meta")), "teacher_logits_MK is on meta, student_logits_MK on cpu"),
        (lambda s, t: (s, t, 0.0), "student_temperature is 0.0, expected a positive"),
        (lambda s, t: (s, t, 1.0, float("nan")), "teacher_temperature is nan, expected a positive"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    student, teacher = (x.detach() for x in _logits(4, 9, torch.float32))
    with pytest.raises(ValueError, match=f"dense_distillation_cross_entropy: {message}"):
        dense_distillation_cross_entropy(*change(student, teacher))
