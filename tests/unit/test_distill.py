"""Distillation between similarity matrices against the oracle: values, gradients, memory, compiler, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cosmos_fast.ops import distill_tiled, distillation_cross_entropy
from cosmos_kernels import reference

# student views a, b; teacher views a, b; rows, columns, student's and teacher's dimensions
SHAPES = [(1, 1, 1, 1, 1, 1, 4, 4), (2, 3, 2, 3, 7, 7, 5, 3), (3, 2, 1, 2, 5, 9, 4, 6), (2, 2, 1, 1, 9, 4, 8, 8)]


def _unit(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def _inputs(shape: tuple[int, ...], scale: float = 10.0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Student a, b, teacher a, b, student's scale (12 % above the teacher's), teacher's."""
    views_a, views_b, teacher_views_a, teacher_views_b, rows, columns, dim, teacher_dim = shape
    student = [_unit(views_a, rows, dim, dtype=dtype), _unit(views_b, columns, dim, dtype=dtype)]
    teacher = [_unit(teacher_views_a, rows, teacher_dim), _unit(teacher_views_b, columns, teacher_dim)]
    scales = [torch.tensor(factor * scale, dtype=dtype) for factor in (1.12, 1.0)]
    tensors = [*student, *(x.to(dtype) for x in teacher), *scales]
    for index in (0, 1, 4):
        tensors[index].requires_grad_()
    return tensors


def _value_and_gradients(run, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    loss = run(*inputs)
    return [loss, *torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])]


def _assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor], **tolerance: float) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


def _clip_style(image, text, teacher_image, teacher_text, scale, teacher_scale):
    """The published objective in its own words: F.cross_entropy with probabilities, image to text and back."""
    logits, targets = scale * image @ text.T, teacher_scale * teacher_image @ teacher_text.T
    per_image = F.cross_entropy(logits, targets.softmax(1))
    return (per_image + F.cross_entropy(logits.T, targets.T.softmax(1))) / 2


def test_oracle_is_the_cross_entropy_with_soft_targets():
    torch.manual_seed(0)
    views = _inputs((1, 1, 1, 1, 6, 6, 5, 5))
    flat = [x.squeeze(0).detach().requires_grad_(x.requires_grad) for x in views]
    expected = _value_and_gradients(_clip_style, flat)
    _assert_same(_value_and_gradients(distillation_cross_entropy, flat), expected)
    oracle = reference.distillation_cross_entropy(*views)
    torch.testing.assert_close(oracle, expected[0])


@pytest.mark.parametrize("tile_elements", [distill_tiled.TILE_ELEMENTS, 30, 4])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0, 2000.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_pair_loop(monkeypatch, shape, scale, tile_elements):
    monkeypatch.setattr(distill_tiled, "TILE_ELEMENTS", tile_elements)
    torch.manual_seed(shape[0] + shape[4])
    inputs = _inputs(shape, scale)
    expected = _value_and_gradients(reference.distillation_cross_entropy, inputs)
    actual = _value_and_gradients(distillation_cross_entropy, inputs)
    _assert_same(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["tiled", "eager"])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_gradcheck(monkeypatch, scale, backend):
    monkeypatch.setattr(distill_tiled, "TILE_ELEMENTS", 12)
    torch.manual_seed(0)
    a, b, teacher_a, teacher_b, student_scale, teacher_scale = _inputs((2, 3, 1, 3, 4, 5, 3, 3), scale)

    def run(a, b, scale):
        return distillation_cross_entropy(a, b, teacher_a, teacher_b, scale, teacher_scale, backend=backend)

    assert torch.autograd.gradcheck(run, (a, b, student_scale), eps=1e-7)


def test_student_equal_to_teacher_gives_entropy_and_no_gradient():
    torch.manual_seed(0)
    a, b, *_ = _inputs((2, 3, 2, 3, 6, 6, 5, 5))
    scale = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    loss = distillation_cross_entropy(a, b, a.detach(), b.detach(), scale, scale.detach())
    logits = scale * torch.einsum("vid,wjd->vwij", a, b)
    entropies = [-(logits.softmax(dim) * logits.log_softmax(dim)).sum(dim).mean() for dim in (2, 3)]
    torch.testing.assert_close(loss, sum(entropies) / 2)
    for gradient in torch.autograd.grad(loss, (a, b, scale)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_sharp_teacher_gives_the_hard_label_loss():
    """A teacher that is certain of the diagonal makes this InfoNCE."""
    torch.manual_seed(0)
    a, b, *_, scale, _ = _inputs((2, 3, 1, 1, 6, 6, 8, 8))
    certain = torch.eye(6, dtype=torch.float64).unsqueeze(0)
    sharp = torch.tensor(1e4, dtype=torch.float64)
    soft = distillation_cross_entropy(a, b, certain, certain, scale, sharp)
    torch.testing.assert_close(soft, reference.multiview_infonce(a, b, scale))


@pytest.mark.parametrize("wanted", [(0,), (1,), (4,), (0, 1), (1, 4), (0, 4)])
def test_gradient_only_for_what_needs_it(wanted):
    torch.manual_seed(0)
    inputs = _inputs(SHAPES[1])
    for index, tensor in enumerate(inputs):
        tensor.requires_grad_(index in (*wanted, 2, 3, 5))
    expected = torch.autograd.grad(reference.distillation_cross_entropy(*inputs), [inputs[i] for i in wanted])
    distillation_cross_entropy(*inputs).backward()
    for index, tensor in enumerate(inputs):
        assert (tensor.grad is not None) == (index in wanted), index
    _assert_same([inputs[i].grad for i in wanted], list(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_inputs_are_summed_in_fp32(dtype):
    torch.manual_seed(3)
    inputs = _inputs((2, 2, 1, 2, 64, 48, 40, 40), 40.0, dtype)
    truth = _value_and_gradients(lambda *x: reference.distillation_cross_entropy(*(y.double() for y in x)), inputs)
    eager = _value_and_gradients(lambda *x: distillation_cross_entropy(*x, backend="eager"), inputs)
    tiled = _value_and_gradients(distillation_cross_entropy, inputs)
    assert tiled[0].dtype == torch.float32
    assert tiled[1].dtype == dtype
    for true, loose, ours in zip(truth, eager, tiled, strict=True):
        noise = (loose.double() - true.double()).norm()
        # results are rounded to their dtype: an entry may fall to either side
        rounding = torch.finfo(ours.dtype).eps * true.double().norm()
        assert (ours.double() - true.double()).norm() <= 2 * noise + rounding


def test_teacher_of_another_dtype():
    torch.manual_seed(0)
    inputs = _inputs(SHAPES[1], dtype=torch.float32)
    inputs[2:4] = [x.bfloat16() for x in inputs[2:4]]
    expected = _value_and_gradients(lambda *x: distillation_cross_entropy(*x, backend="eager"), inputs)
    _assert_same(_value_and_gradients(distillation_cross_entropy, inputs), expected, rtol=1e-5, atol=1e-6)


def test_no_logits_are_stored_and_workspace_does_not_grow_with_the_batch():
    torch.manual_seed(0)
    batch = 512
    inputs = _inputs((2, 2, 1, 2, batch, batch, 16, 16), dtype=torch.float32)
    saved: list[torch.Tensor] = []
    largest = [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest[0] = max(largest[0], tensor.numel())
            return out

    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t), Watch():
        distillation_cross_entropy(*inputs).backward()
    beyond = sum(t.nbytes for t in saved if not any(t.data_ptr() == x.data_ptr() for x in inputs))
    assert beyond == 2 * 5 * 4 * (2 * 2 * batch)  # rows and columns, five fp32 numbers each, four pairs
    assert largest[0] <= distill_tiled.TILE_ELEMENTS


def test_non_contiguous_inputs():
    torch.manual_seed(0)
    a = torch.randn(5, 2, 8, dtype=torch.float64).transpose(0, 1)
    b = torch.randn(8, 5, 3, dtype=torch.float64).permute(2, 1, 0)
    scale = torch.tensor(3.0, dtype=torch.float64)
    arguments = (a, b, b[:1], a[:1], scale, 2 * scale)
    torch.testing.assert_close(distillation_cross_entropy(*arguments), reference.distillation_cross_entropy(*arguments))


@pytest.mark.parametrize("magnitude", [1e-4, 1e3])
def test_norms_far_from_one(magnitude):
    torch.manual_seed(0)
    inputs = [magnitude * x.detach() if x.dim() else x.detach() for x in _inputs(SHAPES[1], 1.0)]
    torch.testing.assert_close(distillation_cross_entropy(*inputs), reference.distillation_cross_entropy(*inputs))


def test_identical_features_give_log_of_the_batch():
    same = F.normalize(torch.ones(2, 7, 4), dim=-1)
    loss = distillation_cross_entropy(same, same, same, same, torch.tensor(100.0), torch.tensor(100.0))
    torch.testing.assert_close(loss, torch.tensor(7.0).log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", range(6))
def test_nan_in_gives_nan_out(index):
    inputs = _inputs(SHAPES[1], dtype=torch.float32)
    with torch.no_grad():
        inputs[index].view(-1)[0] = float("nan")
    loss, *gradients = _value_and_gradients(distillation_cross_entropy, inputs)
    assert loss.isnan()
    assert all(gradient.isnan().any() for gradient in gradients)


def test_same_bits_every_time():
    inputs = _inputs((2, 2, 1, 2, 130, 70, 33, 33), dtype=torch.float32)
    first, second = (_value_and_gradients(distillation_cross_entropy, inputs) for _ in range(2))
    _assert_same(first, second, rtol=0, atol=0)


def test_stage_operations_are_sound():
    torch.manual_seed(0)
    a, b, teacher_a, teacher_b, *scales = (x.detach() for x in _inputs(SHAPES[2], dtype=torch.float32))
    inputs = (a, b, teacher_a, teacher_b, *scales)
    torch.library.opcheck(torch.ops.cosmos_fast.distill_statistics.default, (*inputs, "tiled"))
    states = torch.ops.cosmos_fast.distill_statistics(*inputs, "tiled")
    for want_a, want_b in ((True, False), (False, True), (True, True)):
        torch.library.opcheck(
            torch.ops.cosmos_fast.distill_feature_gradients.default,
            (*inputs, *states, 1.0, 0.5, want_a, want_b, "tiled"),
        )


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda x: x[0, 0], r"student_a has shape \(5,\), expected non-empty \[views, batch, D\]"),
        (0, lambda x: x[:0], r"student_a has shape \(0, 7, 5\), expected non-empty"),
        (1, lambda x: x[..., :4], r"student_b has shape \(3, 7, 4\).* expected \[views, batch, 5\]"),
        (1, lambda x: x.double(), "student_b .* is torch.float64, expected .* torch.float32 like student_a"),
        (1, lambda x: x.to("meta"), "student_b is on meta, expected cpu like student_a"),
        (2, lambda x: x[:, :6], r"teacher_a has shape \(2, 6, 3\), expected \[1 or 2, 7, D\] like student_a"),
        (3, lambda x: x[:2], r"teacher_b has shape \(2, 7, 3\), expected \[1 or 3, 7, D\] like student_b"),
        (3, lambda x: x[..., :2], r"teacher_b has shape \(3, 7, 2\).* expected \[views, batch, 3\]"),
        (2, lambda x: x.long(), "teacher_a has dtype torch.int64, expected a floating-point dtype"),
        (4, lambda x: x.view(1), r"student_scale has shape \(1,\), expected a scalar"),
        (5, lambda x: x.to("meta"), "teacher_scale is torch.float32 on meta, expected a float on cpu"),
    ],
)
def test_arguments_that_do_not_fit_are_named(index, change, message):
    inputs = [x.detach() for x in _inputs(SHAPES[1], dtype=torch.float32)]
    inputs[index] = change(inputs[index])
    with pytest.raises(ValueError, match=f"distillation_cross_entropy: {message}"):
        distillation_cross_entropy(*inputs)
