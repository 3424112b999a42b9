"""The tiled multi-view loss against the oracle: values, every gradient, memory, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cosmos_fast.ops import infonce_tiled, multiview_infonce
from cosmos_kernels import reference

SHAPES = [(2, 8, 5, 6), (16, 4, 7, 5), (1, 1, 1, 4), (3, 2, 9, 8)]


def _features(views: int, batch: int, dim: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return F.normalize(torch.randn(views, batch, dim, dtype=dtype), dim=-1).requires_grad_()


def _value_and_gradients(run, *inputs):
    loss = run(*inputs)
    return [loss, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("tile_elements", [infonce_tiled.TILE_ELEMENTS, 300, 17])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0, 3000.0])
@pytest.mark.parametrize(("views_a", "views_b", "batch", "dim"), SHAPES)
def test_equals_the_pair_loop(monkeypatch, views_a, views_b, batch, dim, scale, tile_elements):
    monkeypatch.setattr(infonce_tiled, "TILE_ELEMENTS", tile_elements)
    torch.manual_seed(views_a + batch)
    inputs = _features(views_a, batch, dim), _features(views_b, batch, dim)
    log_scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    expected = _value_and_gradients(reference.multiview_infonce, *inputs, log_scale)
    actual = _value_and_gradients(multiview_infonce, *inputs, log_scale)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_ragged_batch_over_many_tiles(monkeypatch):
    monkeypatch.setattr(infonce_tiled, "TILE_ELEMENTS", 3000)
    torch.manual_seed(0)
    inputs = _features(2, 130, 33), _features(3, 130, 33), torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    expected = _value_and_gradients(reference.multiview_infonce, *inputs)
    for ours, theirs in zip(_value_and_gradients(multiview_infonce, *inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_gradcheck(monkeypatch, scale):
    monkeypatch.setattr(infonce_tiled, "TILE_ELEMENTS", 12)
    torch.manual_seed(0)
    a, b = _features(2, 4, 3), _features(3, 4, 3)
    assert torch.autograd.gradcheck(multiview_infonce, (a, b, torch.tensor(scale, dtype=torch.float64)), eps=1e-7)
    assert torch.autograd.gradcheck(
        lambda s: multiview_infonce(a.detach(), b.detach(), s),
        torch.tensor(scale, dtype=torch.float64, requires_grad=True),
    )


def test_eager_backend_is_the_oracle():
    torch.manual_seed(0)
    a, b, scale = _features(2, 5, 4), _features(3, 5, 4), torch.tensor(10.0, dtype=torch.float64)
    eager = multiview_infonce(a, b, scale, backend="eager")
    torch.testing.assert_close(eager, reference.multiview_infonce(a, b, scale), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_inputs_are_summed_in_fp32(dtype):
    """Error against fp64 truth of the same rounded inputs is no worse than twice that of eager in fp32."""
    torch.manual_seed(3)
    a, b = (_features(2, 64, 48, torch.float32).detach().to(dtype).requires_grad_() for _ in range(2))
    scale = torch.tensor(40.0)
    truth = _value_and_gradients(lambda x, y: reference.multiview_infonce(x.double(), y.double(), scale.double()), a, b)
    eager = _value_and_gradients(lambda x, y: multiview_infonce(x, y, scale, backend="eager"), a, b)
    tiled = _value_and_gradients(lambda x, y: multiview_infonce(x, y, scale), a, b)
    assert tiled[0].dtype == torch.float32
    assert tiled[1].dtype == dtype
    for true, loose, ours in zip(truth, eager, tiled, strict=True):
        noise = (loose.double() - true.double()).norm()
        # results are rounded to their dtype: an entry may fall to either side
        rounding = torch.finfo(ours.dtype).eps * true.double().norm()
        assert (ours.double() - true.double()).norm() <= 2 * noise + rounding


@pytest.mark.parametrize("backend", ["tiled", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scale_stays_in_fp32(dtype, backend):
    """14.3 is 14.3125 in bf16 and 14.297 in fp16: with products as exact as sums, the loss would show it."""
    torch.manual_seed(0)
    a, b = (_features(2, 9, 8, torch.float32).detach().to(dtype) for _ in range(2))
    scale = torch.tensor(14.3, requires_grad=True)
    exact = scale.detach().double().requires_grad_()
    truth = reference.multiview_infonce(a.double(), b.double(), exact)
    loss = multiview_infonce(a, b, scale, backend=backend)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    found, expected = torch.autograd.grad(loss, scale)[0], torch.autograd.grad(truth, exact)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_no_logits_are_stored_and_workspace_does_not_grow_with_the_batch():
    torch.manual_seed(0)
    batch, dim = 512, 16
    a, b = _features(4, batch, dim, torch.float32), _features(2, batch, dim, torch.float32)
    saved: list[int] = []
    largest = [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest[0] = max(largest[0], out.numel())
            return out

    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t), Watch():
        multiview_infonce(a, b, torch.tensor(14.0)).backward()
    assert max(saved) < batch * batch
    assert largest[0] <= infonce_tiled.TILE_ELEMENTS


def test_gradient_only_for_the_side_that_needs_it():
    a, teacher = _features(4, 6, 8), _features(2, 6, 8).detach()
    multiview_infonce(a, teacher, torch.tensor(5.0, dtype=torch.float64)).backward()
    assert a.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("wants", ["a", "b", "scale"])
def test_each_gradient_alone(wants):
    torch.manual_seed(0)
    inputs = {"a": _features(4, 6, 8), "b": _features(2, 6, 8), "scale": torch.tensor(9.0, dtype=torch.float64)}
    inputs = {name: tensor.detach().requires_grad_(name == wants) for name, tensor in inputs.items()}
    expected = torch.autograd.grad(reference.multiview_infonce(*inputs.values()), inputs[wants])
    actual = torch.autograd.grad(multiview_infonce(*inputs.values()), inputs[wants])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("columns", "offset"), [(12, 0), (12, 4), (12, 7), (6, 1)])
def test_local_rows_against_more_columns(columns, offset):
    """Row i belongs to column offset + i; the others are negatives of every row, and have gradients."""
    torch.manual_seed(0)
    inputs = _features(3, 5, 8), _features(4, columns, 8), torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    expected = _value_and_gradients(lambda *x: multiview_infonce(*x, offset=offset, backend="eager"), *inputs)
    actual = _value_and_gradients(lambda *x: multiview_infonce(*x, offset=offset), *inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(expected[0], _one_rank_by_hand(*inputs, offset))


def _one_rank_by_hand(a, b, scale, offset):
    logits = scale * torch.einsum("aid,bjd->abij", a, b)
    own = logits[..., offset : offset + a.shape[1]]
    rows, columns = logits.logsumexp(3), own.logsumexp(2)
    return ((rows + columns) / 2 - own.diagonal(dim1=2, dim2=3)).mean()


def test_a_sequence_stands_for_its_concatenation():
    torch.manual_seed(0)
    first, second, b = _features(2, 6, 8), _features(3, 6, 8), _features(1, 6, 8)
    scale = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    expected = _value_and_gradients(lambda x, y, *z: multiview_infonce(torch.cat([x, y]), *z), first, second, b, scale)
    actual = _value_and_gradients(lambda x, y, *z: multiview_infonce((x, y), *z), first, second, b, scale)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["tiled", "eager"])
def test_operands_may_be_rounded_and_gradients_keep_their_dtype(backend):
    torch.manual_seed(0)
    a, b, scale = _features(2, 9, 8, torch.float32), _features(3, 9, 8, torch.float32), torch.tensor(12.0)
    rounded = [x.detach().half().double().requires_grad_() for x in (a, b)]
    truth = _value_and_gradients(lambda *x: reference.multiview_infonce(*x, scale.double()), *rounded)
    rounding = {"operand_dtype": torch.float16, "backend": backend}
    found = _value_and_gradients(lambda *x: multiview_infonce(*x, scale, **rounding), a, b)
    exact = multiview_infonce(a, b, scale, backend=backend)
    assert not torch.equal(found[0], exact)
    assert {tensor.dtype for tensor in found} == {torch.float32}
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-7, check_dtype=False)


def test_non_contiguous_inputs():
    torch.manual_seed(0)
    a = torch.randn(5, 2, 8, dtype=torch.float64).transpose(0, 1)
    b = torch.randn(8, 5, 3, dtype=torch.float64).permute(2, 1, 0)
    scale = torch.tensor(3.0, dtype=torch.float64)
    torch.testing.assert_close(multiview_infonce(a, b, scale), reference.multiview_infonce(a, b, scale))


@pytest.mark.parametrize("magnitude", [1e-4, 1e3])
def test_norms_far_from_one(magnitude):
    torch.manual_seed(0)
    a, b = (magnitude * _features(2, 6, 8) for _ in range(2))
    scale = torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close(multiview_infonce(a, b, scale), reference.multiview_infonce(a, b, scale))


def test_identical_features_give_log_of_the_batch():
    same = F.normalize(torch.ones(2, 7, 4), dim=-1)
    loss = multiview_infonce(same, same, torch.tensor(100.0))
    torch.testing.assert_close(loss, torch.tensor(7.0).log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, s: (a[0], b, s), r"a_VBD has shape \(4, 3\)"),
        (lambda a, b, s: (a, b[:, :3], s), r"b_VBD has shape \(2, 3, 3\), expected \[views, 4 or more, 3\]"),
        (lambda a, b, s: (a, b.double(), s), "b_VBD is torch.float64"),
        (lambda a, b, s: (a.long(), b.long(), s), "floating-point"),
        (lambda a, b, s: (a, b, s.view(1)), r"scale has shape \(1,\), expected a scalar"),
        (lambda a, b, s: (a, b, s.long()), "scale is torch.int64 on cpu, expected a float on cpu"),
        (lambda a, b, s: (a, b, s.to("meta")), "scale is torch.float32 on meta, expected a float on cpu"),
        (lambda a, b, s: ([], b, s), "a_VBD is an empty sequence"),
        (lambda a, b, s: ((a, a[:, :3]), b, s), r"a_VBD\[1\] has shape \(2, 3, 3\), expected \[views, 4, 3\]"),
        (lambda a, b, s: (a[:0], b, s), "non-empty"),
        (lambda a, b, s: (a.to("meta"), b, s), "on cpu, expected torch.float32 on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    a, b = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match=message):
        multiview_infonce(*change(a, b, torch.tensor(1.0)))


@pytest.mark.parametrize(("offset", "columns"), [(-1, 4), (1, 4), (3, 6)])
def test_an_offset_outside_the_columns_is_refused(offset, columns):
    a, b = torch.randn(2, 4, 3), torch.randn(2, columns, 3)
    with pytest.raises(ValueError, match=rf"offset is {offset}, expected 0 to {columns - 4}: b_VBD has {columns} col"):
        multiview_infonce(a, b, torch.tensor(1.0), offset=offset)


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["rows", "columns", "scale"])
def test_a_second_derivative_is_refused(wanted):
    """Beside another term it would be a wrong result: as autograd sees it, the first one is a constant."""
    inputs = _features(2, 3, 4), _features(2, 3, 4), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss = multiview_infonce(*inputs) + inputs[wanted].pow(3).sum()
    (first,) = torch.autograd.grad(loss, inputs[wanted], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(first.square().sum(), inputs[wanted])
