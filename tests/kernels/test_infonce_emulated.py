"""csrc/infonce_backward_cuda.cu, its own source compiled for the host, against fp64 truth.

What hardware leaves open (when asynchronous copies land, in which order threads run) is tried at both ends.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_kernels import infonce_cuda
from tests.kernels.emulated_library import emulated, emulated_folder, guarded, guarded_allocations  # noqa: F401
from tests.kernels.truth import assert_tensors_no_worse, error

pytestmark = pytest.mark.usefixtures("emulated")

TILE_BYTES = {infonce_cuda.MMA_SYNC: 128 * 128 * 2, infonce_cuda.WGMMA: 128 * 256 * 2}
HALF, BFLOAT16 = torch.float16, torch.bfloat16
ERROR = {HALF: 1e-3, BFLOAT16: 8e-3}  # largest deviation over largest entry: a few roundings of g and of a feature


class Case(NamedTuple):
    row_views: int
    rows: int
    column_views: int
    columns: int
    dim: int
    offset: int = 0
    scale: float = 14.3
    dtype: torch.dtype = HALF


CASES = [
    Case(1, 1, 1, 1, 32),
    Case(1, 7, 2, 7, 48, dtype=BFLOAT16),
    Case(8, 7, 1, 9, 32, offset=2),
    Case(3, 64, 1, 64, 100, scale=100.0),
    Case(1, 130, 1, 260, 48, offset=130),
    Case(2, 64, 2, 130, 100, offset=66, scale=1.0, dtype=BFLOAT16),
    Case(1, 64, 1, 64, 512),
]


@pytest.fixture(params=["mma.sync", "wgmma"])
def path(request, monkeypatch):
    if request.param == "wgmma":
        monkeypatch.setattr(infonce_cuda, "PATH", infonce_cuda.WGMMA)
        monkeypatch.setenv("COSMOS_EMULATION", "sm_90")
    return request.param


def features(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(case.row_views, case.rows, case.dim, generator=generator), dim=-1)
    columns = F.normalize(torch.randn(case.column_views, case.columns, case.dim, generator=generator), dim=-1)
    matching = columns[:, case.offset : case.offset + case.rows]
    matching.add_(0.3 * rows.mean(0))  # positives are closer than chance, as in training
    return rows.to(case.dtype), F.normalize(columns, dim=-1).to(case.dtype)


def stage(rows: Tensor, columns: Tensor, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The stage's definition in plain PyTorch, in `dtype`; log-sum-exps in fp64."""
    row_lse, col_lse = log_sum_exps(rows, columns, case.scale)
    x, y = rows.to(dtype), columns.to(dtype)
    s = torch.einsum("aid,bjd->aibj", x, y) * case.scale
    g = (s - row_lse.to(dtype).unsqueeze(3)).exp() + (s - col_lse.to(dtype).unsqueeze(1)).exp()
    index = torch.arange(case.rows)
    g[:, index, :, index + case.offset] -= 2
    return {"rows": torch.einsum("aibj,bjd->aid", g, y), "columns": torch.einsum("aibj,aid->bjd", g, x)}


def log_sum_exps(rows: Tensor, columns: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    s = torch.einsum("aid,bjd->aibj", rows.double(), columns.double()) * scale
    return s.logsumexp(3), s.logsumexp(1)


def kernel(rows: Tensor, columns: Tensor, case: Case, *, want_columns: bool = True, tiles: int | None = None):
    row_lse, col_lse = (lse.float() for lse in log_sum_exps(rows, columns, case.scale))
    grad_rows, grad_columns = infonce_cuda.feature_gradients(
        rows,
        columns,
        torch.tensor(case.scale),
        guarded(row_lse),
        guarded(col_lse),
        case.offset,
        want_columns,
        workspace_bytes=None if tiles is None else tiles * TILE_BYTES[infonce_cuda.PATH],
    )
    return {"rows": grad_rows, "columns": grad_columns}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, path, monkeypatch):
    rows, columns = (guarded(side) for side in features(case))
    with guarded_allocations(monkeypatch):
        found = kernel(rows, columns, case)
    truth = stage(rows, columns, case, torch.float64)
    assert_tensors_no_worse(found, stage(rows, columns, case, case.dtype), truth, factor=3.0)
    assert_close(found, truth, case.dtype)


def assert_close(found: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype) -> None:
    errors = {name: error(found[name], truth[name]) for name in truth}
    assert max(errors.values()) <= ERROR[dtype], errors


@pytest.mark.parametrize("order", ["", "late", "reverse", "late,reverse"])
def test_chunks_and_orders(order, path, monkeypatch):
    """Two tiles of workspace for twelve tiles of logits (eight of wgmma's); threads and copies in every order."""
    monkeypatch.setenv("COSMOS_EMULATION", f"sm_90,{order}")
    case = Case(2, 130, 1, 300, 32, offset=100)
    rows, columns = features(case)
    found = kernel(rows, columns, case, tiles=2)
    assert_close(found, stage(rows, columns, case, torch.float64), case.dtype)
    again = kernel(rows, columns, case, tiles=2)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_rows_only(path):
    case = Case(2, 64, 3, 64, 32)
    rows, columns = features(case)
    found = kernel(rows, columns, case, want_columns=False)
    assert found["columns"].numel() == 0
    truth = stage(rows, columns, case, torch.float64)
    assert error(found["rows"], truth["rows"]) <= ERROR[HALF]


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16])
def test_log_sum_exps_far_apart_in_one_tile(dtype, path):
    """No single exponential serves both directions: some rows are nearly zero, others equal their columns."""
    case = Case(1, 32, 1, 32, 32, scale=100.0, dtype=dtype)
    rows, columns = features(case)
    columns[0, :16] = rows[0, :16]
    rows[0, 16:] *= 1e-3
    row_lse, _ = log_sum_exps(rows, columns, case.scale)
    assert (row_lse.max() - row_lse.min()) * 1.4427 > 100
    assert_close(kernel(rows, columns, case), stage(rows, columns, case, torch.float64), dtype)


def test_infinite_column_terms_do_not_count():
    case = Case(1, 20, 1, 50, 32, offset=10)
    rows, columns = features(case)
    row_lse, col_lse = (lse.float() for lse in log_sum_exps(rows, columns, case.scale))
    col_lse[:, :, :10] = col_lse[:, :, 30:] = torch.inf
    scale = torch.tensor(case.scale)
    found, _ = infonce_cuda.feature_gradients(rows, columns, scale, row_lse, col_lse, case.offset, False)
    s = rows[0].double() @ columns[0].double().T * case.scale
    g = s.softmax(1)
    g[:, 10:30] += (s[:, 10:30] - col_lse[0, 0, 10:30]).exp() - 2 * torch.eye(20)
    assert error(found[0], g @ columns[0].double()) <= ERROR[HALF]


@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_tiny_and_huge_norms(size):
    case = Case(1, 40, 1, 40, 32, scale=10.0)
    rows, columns = (size * side for side in features(case))
    truth = stage(rows, columns, case, torch.float64)
    assert_tensors_no_worse(kernel(rows, columns, case), stage(rows, columns, case, case.dtype), truth, factor=3.0)


def test_identical_features():
    """Every logit is equal: g is 2 / 33 off the diagonal and 2 / 33 - 2 on it, and gradients cancel."""
    case = Case(1, 33, 1, 33, 32)
    rows = F.normalize(torch.ones(1, 33, 32), dim=-1).half()
    found = kernel(rows, rows.clone(), case)
    assert max(found["rows"].abs().max(), found["columns"].abs().max()) < 2e-3


def test_nan_stays_in_its_row_and_reaches_all_columns(path):
    case = Case(1, 40, 1, 40, 32)
    rows, columns = features(case)
    rows[0, 3, 5] = torch.nan
    found = kernel(rows, columns, case)
    assert found["rows"][0, 3].isnan().all()
    assert found["columns"].isnan().all()


def test_strided_features():
    case = Case(2, 20, 1, 30, 32, offset=5)
    rows, columns = features(case)
    strided_rows, strided_columns = (side.transpose(1, 2).contiguous().transpose(1, 2) for side in (rows, columns))
    assert not strided_rows.is_contiguous()
    straight, strided = kernel(rows, columns, case), kernel(strided_rows, strided_columns, case)
    assert all(torch.equal(straight[name], strided[name]) for name in straight)


def test_bad_arguments_are_refused_in_words():
    case = Case(1, 20, 1, 30, 32)
    rows, columns = features(case)
    with pytest.raises(RuntimeError, match="cosmos_infonce_backward: an argument is out of range"):
        kernel(rows, columns, case, tiles=0)
    beyond = torch.zeros(1, 20, 1), torch.zeros(1, 1, 30), 11, True
    with pytest.raises(RuntimeError, match="out of range"):
        infonce_cuda.feature_gradients(rows, columns, torch.tensor(1.0), *beyond)


def test_wgmma_needs_its_device(monkeypatch):
    monkeypatch.setattr(infonce_cuda, "PATH", infonce_cuda.WGMMA)
    monkeypatch.delenv("COSMOS_EMULATION", raising=False)
    case = Case(1, 2, 1, 2, 32)
    with pytest.raises(RuntimeError, match="this device cannot run the path that was asked for"):
        kernel(*features(case), case)


def test_what_it_does_not_take():
    half, single = torch.zeros(1, 2, 8, dtype=HALF), torch.zeros(1, 2, 8)
    assert "float16 or bfloat16" in infonce_cuda.why_unsupported(single, single)
    assert "needs CUDA tensors" in infonce_cuda.why_unsupported(half, half)
