"""The Triton kernels of distillation between similarities against fp64 truth; interpreted where there is no GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_fast.ops import distillation_cross_entropy
from cosmos_kernels import distill_triton, reference
from tests.kernels.truth import assert_no_worse, outcome, tf32x3_rounding

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TEACHER = ("teacher_a", "teacher_b", "teacher_scale")

# student views a, b; teacher views a, b; rows, columns, student's and teacher's dimensions
SHAPES = [
    (1, 1, 1, 1, 1, 1, 32, 32),
    (2, 3, 2, 3, 7, 7, 48, 100),
    (3, 2, 1, 2, 7, 40, 100, 32),
    (2, 2, 2, 1, 64, 130, 32, 48),
    (1, 1, 1, 1, 130, 64, 48, 48),
    (8, 1, 8, 1, 1, 7, 32, 32),
    (1, 1, 1, 1, 20, 20, 512, 512),
    (5, 6, 5, 1, 1, 1, 32, 32),
    (4, 7, 1, 7, 1, 7, 32, 48),
]
SCALES = [1.0, 100.0]


def _inputs(shape: tuple[int, ...], device: str, scale: float = 14.3) -> dict[str, Tensor]:
    views_a, views_b, teacher_views_a, teacher_views_b, rows, columns, dim, teacher_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def unit(*size: int) -> Tensor:
        return F.normalize(torch.randn(*size, generator=generator), dim=-1).to(device)

    return {
        "student_a": unit(views_a, rows, dim),
        "student_b": unit(views_b, columns, dim),
        "teacher_a": unit(teacher_views_a, rows, teacher_dim),
        "teacher_b": unit(teacher_views_b, columns, teacher_dim),
        "student_scale": torch.tensor(1.1 * scale, device=device),
        "teacher_scale": torch.tensor(scale, device=device),
    }


def _oracle(student_a, student_b, teacher_a, teacher_b, student_scale, teacher_scale) -> Tensor:
    return reference.distillation_cross_entropy(
        student_a, student_b, teacher_a, teacher_b, student_scale, teacher_scale
    )


def _rounding(inputs: dict[str, Tensor]) -> float:
    """What a compiled kernel loses in its products, for the largest logit of student and teacher."""
    largest = 0.0
    for side in ("student", "teacher"):
        a, b, scale = (inputs[f"{side}_{name}"].double() for name in ("a", "b", "scale"))
        largest = max(largest, (scale * (a.flatten(0, 1) @ b.flatten(0, 1).T)).abs().max().item())
    return tf32x3_rounding(largest, inputs["student_a"].dtype, inputs["teacher_a"].dtype)


def _check(inputs: dict[str, Tensor], extra_floor: float = 0.0) -> None:
    judged = partial(outcome, inputs=inputs, without_gradient=TEACHER)
    found = judged(partial(distillation_cross_entropy, backend="triton"))
    assert found.outputs["output 0"].dtype == torch.float32
    assert all(gradient.dtype == inputs[name].dtype for name, gradient in found.gradients.items())
    eager, truth = judged(_oracle), judged(_oracle, dtype=torch.float64)
    assert_no_worse(found, eager, truth, extra_floor=extra_floor, rounding=_rounding(inputs))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, device):
    _check(_inputs(shape, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_dtypes_and_scales(dtype, scale, device):
    _check({name: x.to(dtype) for name, x in _inputs(SHAPES[2], device, scale).items()})


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles_programs_pieces_and_chunks(monkeypatch, dtype, device):
    monkeypatch.setattr(distill_triton, "MAX_BLOCK_M", 32)
    monkeypatch.setattr(distill_triton, "MAX_BLOCK_N", 32 if dtype != torch.float32 else 128)
    monkeypatch.setattr(distill_triton, "MIN_PROGRAMS", 30)  # columns are split
    monkeypatch.setattr(distill_triton, "STATE_BYTES", 3 * 4 * 5 * 2 * 90)  # three row tiles a launch
    monkeypatch.setattr(distill_triton, "CHUNK_ROWS", 40)
    monkeypatch.setattr(distill_triton, "CHUNK_BYTES", 40 * 50 * 2)
    _check({name: x.to(dtype) for name, x in _inputs((2, 2, 1, 2, 70, 90, 32, 48), device).items()})


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_program_carries_its_rows_over_many_tiles(monkeypatch, dtype, device):
    """Peaks that rise from tile to tile: what has been summed is told to the new peak."""
    monkeypatch.setattr(distill_triton, "MAX_BLOCK_N", 32 if dtype != torch.float32 else 128)
    monkeypatch.setattr(distill_triton, "MIN_PROGRAMS", 1)
    inputs = _inputs((2, 1, 1, 1, 20, 130, 32, 48), device, 5.0)
    rising = torch.linspace(0.2, 6.0, 130, device=device)[:, None]
    inputs["student_b"], inputs["teacher_b"] = rising * inputs["student_b"], rising.flip(0) * inputs["teacher_b"]
    launches = []
    kernel = distill_triton._statistics_kernel
    monkeypatch.setattr(distill_triton, "_statistics_kernel", _Recorded(kernel, launches))
    _check({name: x.to(dtype) for name, x in inputs.items()})
    assert [grid[1] for grid in launches] == [1]  # one program a row tile: nothing is merged afterwards


class _Recorded:
    """A kernel whose grids are kept."""

    def __init__(self, kernel, grids):
        self.kernel, self.grids = kernel, grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


def test_teacher_of_another_dtype(device):
    inputs = _inputs(SHAPES[2], device)
    _check({**inputs, "teacher_a": inputs["teacher_a"].bfloat16(), "teacher_b": inputs["teacher_b"].bfloat16()})


@pytest.mark.parametrize("magnitude", [1e-3, 30.0, 300.0])
def test_norms_far_from_one(magnitude, device):
    inputs = _inputs(SHAPES[1], device, 1.0)
    # At logits of 900 one rounding is 256 units of an exponential, and it is chance whether it falls on one that
    # counts, here or in eager: of one gradient of nine an element is off by 35 units where eager's is by 7.
    extra = 24 * torch.finfo(torch.float32).eps
    _check({name: magnitude * x if x.dim() else x for name, x in inputs.items()}, extra_floor=extra)


def test_identical_features(device):
    same = F.normalize(torch.ones(2, 7, 32, device=device), dim=-1)
    scale = torch.tensor(100.0, device=device)
    inputs = {"student_a": same, "student_b": same, "teacher_a": same, "teacher_b": same}
    loss = distillation_cross_entropy(**inputs, student_scale=scale, teacher_scale=scale, backend="triton")
    torch.testing.assert_close(loss, torch.tensor(7.0, device=device).log(), rtol=1e-5, atol=1e-5)


def test_non_contiguous(device):
    inputs = _inputs(SHAPES[1], device)
    for name in ("student_a", "teacher_b"):
        inputs[name] = inputs[name].transpose(0, 2).contiguous().transpose(0, 2)
    inputs["student_b"] = torch.cat([inputs["student_b"], inputs["student_b"]], dim=2)[:, :, ::2]
    _check(inputs)


@pytest.mark.parametrize("name", ["student_a", "student_b", "teacher_a", "teacher_b", "student_scale", "teacher_scale"])
def test_nan_in_gives_nan_out(name, device):
    inputs = _inputs(SHAPES[1], device)
    inputs[name].view(-1)[0] = torch.nan
    leaves = {key: x if key in TEACHER else x.requires_grad_() for key, x in inputs.items()}
    loss = distillation_cross_entropy(**leaves, backend="triton")
    loss.backward()
    assert loss.isnan()
    assert all(x.grad.isnan().any() for key, x in leaves.items() if key not in TEACHER)


@pytest.mark.parametrize("wanted", ["student_a", "student_b", "student_scale"])
def test_gradient_only_for_what_needs_it(wanted, device):
    inputs = _inputs(SHAPES[1], device)
    judged = partial(outcome, inputs=inputs, without_gradient=tuple(inputs.keys() - {wanted}))
    found = judged(partial(distillation_cross_entropy, backend="triton"))
    assert found.gradients.keys() == {wanted}
    assert_no_worse(found, judged(_oracle), judged(_oracle, dtype=torch.float64), rounding=_rounding(inputs))


def test_same_bits_every_time(device):
    judge = partial(outcome, inputs=_inputs(SHAPES[2], device), without_gradient=TEACHER)
    first, second = (judge(partial(distillation_cross_entropy, backend="triton")) for _ in range(2))
    for name, gradient in first.gradients.items():
        torch.testing.assert_close(gradient, second.gradients[name], rtol=0, atol=0)


def test_fp64_is_refused(device):
    inputs = {name: x.double() for name, x in _inputs(SHAPES[0], device).items()}
    with pytest.raises(ValueError, match="'triton' was asked for but cannot run: it takes fp32, bf16 and fp16"):
        distillation_cross_entropy(**inputs, backend="triton")
