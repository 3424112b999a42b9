"""The CUDA backward of the contrastive loss on a GPU, behind the public operation, against fp64 truth.

Without a GPU the same sources are tested in the emulation (`test_infonce_emulated.py`).
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cosmos_fast.ops import backends, infonce_tiled, multiview_infonce
from cosmos_kernels import infonce_cuda, reference
from tests.kernels.truth import assert_no_worse, error, outcome

STATUS = {row["backend"]: row["status"] for row in backends.table() if row["op"] == "multiview_infonce"}["cuda"]
ON_GPU = torch.cuda.is_available() and STATUS == "available"
pytestmark = pytest.mark.skipif(not ON_GPU, reason=f"the CUDA backend needs a GPU: {STATUS}")

CUDA = partial(multiview_infonce, backend="cuda")


@pytest.fixture(params=["MMA_SYNC", "WGMMA"], autouse=True)
def path(request, monkeypatch):
    """Both sets of kernels; the second is Hopper's alone."""
    if request.param == "WGMMA" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma needs compute capability 9.0")
    monkeypatch.setattr(infonce_cuda, "PATH", getattr(infonce_cuda, request.param))


def features(views, batch, dim, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(views, batch, dim, generator=generator), dim=-1).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("views_a", "views_b", "batch", "dim", "scale"),
    [(1, 1, 1, 32, 1.0), (8, 2, 7, 48, 14.3), (2, 1, 64, 512, 100.0), (3, 4, 130, 100, 14.3), (1, 2, 1030, 512, 14.3)],
)
def test_loss_and_gradients(views_a, views_b, batch, dim, scale, dtype):
    inputs = {
        "a_VBD": features(views_a, batch, dim, dtype, seed=1),
        "b_VBD": features(views_b, batch, dim, dtype, seed=2),
        "scale": torch.tensor(scale, device="cuda"),
    }
    truth = outcome(reference.multiview_infonce, inputs, torch.float64)
    # Forward and backward add a product in different orders: with one sample, a gradient of exactly zero comes out as a
    # few units in the last place of its logit.
    extra = 12 * torch.finfo(torch.float32).eps
    assert_no_worse(outcome(CUDA, inputs), outcome(reference.multiview_infonce, inputs), truth, extra_floor=extra)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_more_columns_than_rows_in_small_workspaces_and_the_same_bits_twice(dtype):
    rows, columns = features(3, 130, 256, dtype, seed=3), features(2, 520, 256, dtype, seed=4)
    scale = torch.tensor(14.3, device="cuda")
    wide = [tensor.double() for tensor in (rows, columns, scale)]
    lse = infonce_tiled.log_sum_exps(*wide, 260)[:2]
    truth = infonce_tiled.feature_gradients(*wide, *lse, 260, True)
    given = (rows, columns, scale, *(part.float() for part in lse), 260)
    for workspace_bytes in (None, 1 << 16):
        found = infonce_cuda.feature_gradients(*given, True, workspace_bytes=workspace_bytes)
        again = infonce_cuda.feature_gradients(*given, True, workspace_bytes=workspace_bytes)
        for gradient, expected, repeated in zip(found, truth, again, strict=True):
            assert error(gradient, expected) < (2e-3 if dtype == torch.float16 else 1e-2)
            assert torch.equal(gradient, repeated)
    rows_only, none = infonce_cuda.feature_gradients(*given, False)
    assert torch.equal(rows_only, infonce_cuda.feature_gradients(*given, True)[0])
    assert none.numel() == 0


def test_nan_shows_and_nothing_hangs():
    a, b = (features(2, 70, 64, torch.float16, seed=seed).requires_grad_() for seed in (5, 6))
    with torch.no_grad():
        a[1, 3, 5] = float("nan")
    loss = CUDA(a, b, torch.tensor(14.3, device="cuda"))
    loss.backward()
    assert loss.isnan()
    assert a.grad[1, 3].isnan().all()
