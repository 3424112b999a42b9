"""The multi-view loss as an operation of torch: custom ops, compilation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cosmos_fast.ops import multiview_infonce
from cosmos_fast.ops.infonce_autograd import feature_gradients, log_sum_exps

SCALE = torch.tensor(14.0)


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(views, 7, 16), dim=-1).requires_grad_() for views in (4, 2))
    return a, b, SCALE.clone().requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_stages_are_well_formed_operations(dtype: torch.dtype) -> None:
    a, b, scale = (tensor.detach().to(dtype) for tensor in _inputs())
    row_lse, col_lse, _ = log_sum_exps(a, b, scale.float(), 0, "tiled")
    torch.library.opcheck(log_sum_exps, (a, b, scale.float(), 0, "tiled"))
    for want_columns in (False, True):
        arguments = (a, b, scale.float(), row_lse, col_lse, 0, want_columns, "tiled")
        torch.library.opcheck(feature_gradients, arguments)


@pytest.mark.slow
def test_compiles_whole_with_the_same_results() -> None:
    """By inductor; that there is no graph break is asked of every operation and backend."""
    compiled = torch.compile(multiview_infonce, fullgraph=True, backend="inductor")
    inputs = _inputs()
    expected = multiview_infonce(*inputs)
    actual = compiled(*inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs))
