"""Triton's contrastive loss against fp64 truth: both passes, ragged tiles, ranges of logits, chunks, strides."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_fast.ops import infonce_tiled, multiview_infonce
from cosmos_fast.ops.infonce import TRITON_MAX_DIM
from cosmos_fast.ops.infonce_autograd import feature_gradients, log_sum_exps
from cosmos_kernels import infonce_backward_triton, infonce_triton, reference
from cosmos_kernels.infonce_chunks import pairs, rectangles, workspace_elements
from tests.kernels.truth import Outcome, assert_no_worse, outcome, tf32x3_rounding

TRITON = partial(multiview_infonce, backend="triton")
HALF, BFLOAT16, FLOAT = torch.float16, torch.bfloat16, torch.float32


def features(views: int, batch: int, dim: int, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(views, batch, dim, generator=generator), dim=-1).to(device)


def scalar(value: float, device: str) -> Tensor:
    return torch.tensor(value, device=device)


# A log-sum-exp is one fp32 number: at 100, half a unit in its last place is 32 units of every probability of its row.
# PyTorch's own softmax keeps peak and sum apart and can be all but exact, so its error alone is no measure. Rows err
# independently, so their mean errors obey the rule as it stands; of the largest deviations all but 4 of 115 do, and the
# worst (logits of 12870) is 15 units off.
EXTRA = 12 * torch.finfo(torch.float32).eps  # 16 with the four that every fp32 result is allowed

# views of a, views of b, batch, dim, scale, dtype
CASES = [
    (3, 1, 1, 32, 1.0, FLOAT),
    (8, 2, 7, 48, 14.3, FLOAT),
    (2, 1, 64, 512, 100.0, FLOAT),
    (1, 1, 7, 8192, 14.3, FLOAT),
    (1, 2, 130, 100, 14.3, FLOAT),
    (5, 4, 7, 100, 100.0, HALF),
    (1, 2, 130, 48, 14.3, HALF),
    (1, 1, 64, 512, 1.0, HALF),
    (6, 7, 1, 32, 14.3, BFLOAT16),
    (2, 1, 130, 100, 100.0, BFLOAT16),
    (1, 1, 64, 512, 14.3, BFLOAT16),
]
COLUMNS = [(7, 21, 0), (7, 21, 14), (64, 200, 100), (130, 140, 9)]  # batch, columns, offset
EXTREMES = ["one column", "tiny", "huge", "wide range", "negative scale", "zero"]


def rounding(a: Tensor, b: Tensor, scale: Tensor) -> float:
    """What a compiled kernel loses in its products, for the largest logit of the inputs."""
    logits = scale.double() * (a.double().flatten(0, 1) @ b.double().flatten(0, 1).T)
    return tf32x3_rounding(logits.abs().max().item(), a.dtype)


def compare(
    a: Tensor, b: Tensor, scale: Tensor, *, without: tuple[str, ...] = (), lucky: tuple[str, ...] = ()
) -> Outcome:
    """The kernels against the oracle in fp64 and in the features' own dtype."""
    inputs = {"a_VBD": a, "b_VBD": b, "scale": scale}
    truth = outcome(reference.multiview_infonce, inputs, torch.float64, without_gradient=without)
    eager = outcome(reference.multiview_infonce, inputs, without_gradient=without)
    found = outcome(TRITON, inputs, without_gradient=without)
    assert_no_worse(found, eager, truth, extra_floor=EXTRA, rounding=rounding(a, b, scale), lucky=lucky)
    assert found.outputs["output 0"].dtype == FLOAT
    return found


@pytest.mark.parametrize(("views_a", "views_b", "batch", "dim", "scale", "dtype"), CASES)
def test_no_worse_than_eager_in_the_same_dtype(
    views_a: int, views_b: int, batch: int, dim: int, scale: float, dtype: torch.dtype, device: str
) -> None:
    a, b = features(views_a, batch, dim, device), features(views_b, batch, dim, device, seed=1)
    found = compare(a.to(dtype), b.to(dtype), scalar(scale, device))
    assert found.gradients["a_VBD"].dtype == dtype


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16])
def test_the_scale_stays_in_fp32(dtype: torch.dtype, device: str) -> None:
    """14.3 is 14.3125 in bf16 and 14.297 in fp16."""
    a, b = features(2, 20, 32, device).to(dtype), features(1, 20, 32, device, seed=1).to(dtype)
    truth = reference.multiview_infonce(a.double(), b.double(), scalar(14.3, device).double())
    torch.testing.assert_close(TRITON(a, b, scalar(14.3, device)).double(), truth, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("batch", "columns", "offset"), COLUMNS)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_local_rows_against_more_columns(batch: int, columns: int, offset: int, scale: float, device: str) -> None:
    """Diagonals that cross tiles at an angle; eager is computed in fp32."""
    inputs = {
        "a_VBD": features(2, batch, 48, device),
        "b_VBD": features(1, columns, 48, device, seed=1),
        "scale": scalar(scale, device),
    }
    eager_op = partial(multiview_infonce, offset=offset, backend="eager")
    truth, eager = outcome(eager_op, inputs, torch.float64), outcome(eager_op, inputs)
    found = outcome(partial(TRITON, offset=offset), inputs)
    assert_no_worse(found, eager, truth, extra_floor=EXTRA, rounding=rounding(*inputs.values()))


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16])
def test_more_columns_than_rows_in_half_precision(dtype: torch.dtype, device: str) -> None:
    """Products of the same rounded features in fp32: only the gradients are rounded."""
    a, b = features(2, 64, 48, device).to(dtype), features(1, 200, 48, device, seed=1).to(dtype)
    inputs = {"a_VBD": a, "b_VBD": b, "scale": scalar(14.3, device)}
    eager_op = partial(multiview_infonce, offset=100, backend="eager")
    truth, eager = outcome(eager_op, inputs, torch.float64), outcome(eager_op, inputs)
    found = outcome(partial(TRITON, offset=100), inputs)
    # G is rounded to the features' dtype before the library multiplies it.
    assert_no_worse(found, eager, truth, extra_floor=torch.finfo(dtype).eps, lucky=("a_VBD", "b_VBD", "scale"))
    assert found.gradients["b_VBD"].dtype == dtype


def test_small_gradients_keep_their_digits_in_half_precision(device: str) -> None:
    """Of a batch so large that every probability is 1e-7, which fp16 has two digits of, unless it is scaled up."""
    x, y = features(1, 64, 32, device).to(HALF), features(1, 128, 32, device, seed=1).to(HALF)
    y[:, 64:] = 0.0  # the partners: the diagonal leaves nothing
    scale = scalar(14.3, device)
    row_lse, col_lse, _ = infonce_tiled.log_sum_exps(x.double(), y.double(), scale.double(), 64)
    row_lse, col_lse = row_lse + 16.0, torch.full_like(col_lse, float("inf"))
    found, _ = infonce_triton.feature_gradients(x, y, scale, row_lse.float(), col_lse.float(), 64, False)
    args = x.double(), y.double(), scale.double(), row_lse, col_lse
    truth, _ = infonce_tiled.feature_gradients(*args, 64, False)
    assert (found.double() - truth).norm() <= 2e-3 * truth.norm()


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_features(name: str, device: str) -> None:
    a, b, scale = features(2, 70, 48, device), features(1, 70, 48, device, seed=1), 14.3
    if name == "one column":
        b, scale = b[:, :1].repeat(1, 70, 1), 100.0
    elif name == "tiny":
        a, b = 1e-4 * a, 1e-4 * b
    elif name == "huge":
        a, b = 30 * a, 30 * b
    elif name == "wide range":  # rows and tiles whose logits lie hundreds apart: two exponentials an element
        a, b = a * torch.linspace(0, 60, 70, device=device)[:, None], 3 * b
    elif name == "negative scale":
        scale = -14.3
    else:
        a = torch.zeros_like(a)
    # Where all columns are one, or one logit is all of its row, eager's softmax has no error: nor has its sum, the
    # gradient of the scale, while the rounding of a row's log-sum-exp is in all of its probabilities alike.
    lucky = ("scale",) if name in ("one column", "huge") else ()
    compare(a.contiguous(), b.contiguous(), scalar(scale, device), lucky=lucky)


def test_identical_features_give_the_logarithm_of_the_batch_and_no_gradient(device: str) -> None:
    same = features(1, 1, 48, device).repeat(2, 70, 1).requires_grad_()
    loss = TRITON(same, same.detach(), scalar(100.0, device))
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(70.0, device=device).log(), rtol=1e-5, atol=1e-5)
    assert same.grad is not None
    assert same.grad.abs().max() < 1e-4  # of terms of 100 / 70 that cancel


def test_strided_features_of_any_layout(device: str) -> None:
    by_sample = features(20, 3, 32, device).transpose(0, 1)  # [3, 20, 32] with views inside samples
    channels_first = features(2, 32, 20, device, seed=1).transpose(1, 2)
    scale = scalar(14.3, device)
    found = compare(by_sample, channels_first, scale)
    again = compare(by_sample.contiguous(), channels_first.contiguous(), scale)
    torch.testing.assert_close(found.gradients, again.gradients, rtol=0, atol=0)


@pytest.mark.parametrize("without", [("a_VBD",), ("b_VBD", "scale"), ("a_VBD", "b_VBD")])
def test_gradient_only_where_wanted(without: tuple[str, ...], device: str) -> None:
    found = compare(
        features(3, 9, 32, device), features(2, 9, 32, device, seed=1), scalar(9.0, device), without=without
    )
    assert set(found.gradients) == {"a_VBD", "b_VBD", "scale"} - set(without)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("want_columns", [False, True])
def test_small_workspaces_change_nothing_but_the_order_of_sums(
    dtype: torch.dtype, want_columns: bool, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    # Halves have the views, and full floats one pair of them: the interpreter takes four times as long for those.
    views = (2, 3) if dtype == HALF else (1, 2)
    x, y = (features(count, 150, 16, device, seed=count).to(dtype) for count in views)
    scale = scalar(14.3, device)
    forward = infonce_triton.log_sum_exps(x, y, scale, 0)
    whole = infonce_triton.feature_gradients(x, y, scale, *forward[:2], 0, want_columns)
    monkeypatch.setattr(infonce_triton, "PARTIALS_BYTES", 8000)
    monkeypatch.setattr(infonce_backward_triton, "GRADIENT_BYTES", 2 * 130 * 140 * dtype.itemsize)
    torch.testing.assert_close(infonce_triton.log_sum_exps(x, y, scale, 0)[:2], forward[:2], rtol=0, atol=0)
    parts = infonce_triton.feature_gradients(x, y, scale, *forward[:2], 0, want_columns)
    assert parts[1].shape == (y.shape if want_columns else (0,))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_the_same_bits_every_time(device: str) -> None:
    inputs = features(2, 70, 32, device), features(2, 70, 32, device, seed=1), scalar(14.3, device)
    first = infonce_triton.log_sum_exps(*inputs, 0)
    second = infonce_triton.log_sum_exps(*inputs, 0)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    gradients = [infonce_triton.feature_gradients(*inputs, *first[:2], 0, True) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_nan_in_gives_nan_out(device: str) -> None:
    a, b = features(2, 20, 32, device).requires_grad_(), features(2, 20, 32, device, seed=1)
    b[1, 3, 5] = float("nan")
    loss = TRITON(a, b, scalar(14.3, device))
    loss.backward()
    assert loss.isnan()
    assert a.grad is not None
    assert a.grad.isnan().any()


def test_columns_without_a_term_have_no_gradient(device: str) -> None:
    x, y, scale = features(1, 20, 16, device), features(1, 40, 16, device, seed=1), scalar(14.3, device)
    row_lse, col_lse, _ = infonce_triton.log_sum_exps(x, y, scale, 0)
    col_lse[:, :, 20:] = float("inf")
    found = infonce_triton.feature_gradients(x, y, scale, row_lse, col_lse, 0, True)
    expected = infonce_tiled.feature_gradients(x, y, scale, row_lse, col_lse, 0, True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT16])
def test_stages_are_well_formed_operations(dtype: torch.dtype, device: str) -> None:
    a, b, scale = features(2, 7, 16, device).to(dtype), features(1, 7, 16, device).to(dtype), scalar(9.0, device)
    row_lse, col_lse, _ = log_sum_exps(a, b, scale, 0, "triton")
    torch.library.opcheck(log_sum_exps, (a, b, scale, 0, "triton"))
    for want_columns in (False, True):
        torch.library.opcheck(feature_gradients, (a, b, scale, row_lse, col_lse, 0, want_columns, "triton"))


def test_compiles_whole(device: str) -> None:
    inputs = [x.requires_grad_() for x in (features(2, 7, 16, device), features(1, 7, 16, device), scalar(9.0, device))]
    actual = torch.compile(TRITON, fullgraph=True, backend="aot_eager")(*inputs)
    expected = multiview_infonce(*inputs, backend="tiled")
    torch.testing.assert_close(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs))


def test_what_it_cannot_take_is_refused_with_the_reason(device: str) -> None:
    scale = scalar(1.0, device)
    wide = torch.zeros(1, 2, TRITON_MAX_DIM + 1, device=device)
    with pytest.raises(ValueError, match=rf"shape \(1, 2, {TRITON_MAX_DIM + 1}\), it takes D up to {TRITON_MAX_DIM}"):
        TRITON(wide, wide, scale)
    double = torch.zeros(1, 2, 8, device=device, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"features in torch.float64, it takes float32"):
        TRITON(double, double, scale)
    with pytest.raises(ValueError, match=r"'cuda' was asked for but cannot run"):
        multiview_infonce(double, double, scale, backend="cuda")


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize(
    ("sizes", "budget"), [((3, 40, 2, 50), 10_000), ((1, 1, 1, 1), 1024), ((2, 300, 3, 900), 20_000)]
)
def test_rectangles_cover_every_similarity_once(sizes: tuple[int, int, int, int], budget: int, square: bool) -> None:
    row_views, batch, column_views, total = sizes
    seen = torch.zeros(row_views, batch, column_views, total)
    for part in rectangles(*sizes, budget, square):
        assert workspace_elements(part) <= budget
        seen[part.row_views, part.rows, part.column_views, part.columns] += 1
    assert (seen == 1).all()
    for most in (0, 1, 5, 100):
        counts = torch.zeros(row_views, column_views)
        for first_a, views_a, first_b, views_b in pairs(row_views, column_views, most):
            assert views_a * views_b <= max(1, most)
            counts[first_a : first_a + views_a, first_b : first_b + views_b] += 1
        assert (counts == 1).all()
