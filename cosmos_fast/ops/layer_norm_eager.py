"""Residual addition and LayerNorm by PyTorch: the stages that every device and dtype has."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x_TD: Tensor, update_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y = x + update, its LayerNorm in `dtype`, and mean and 1 / std of its rows [2, T]."""
    y_TD = x_TD + update_TD
    wide = torch.promote_types(y_TD.dtype, torch.float32)
    normed_TD, mean_T1, rstd_T1 = torch.native_layer_norm(
        y_TD.to(wide), y_TD.shape[1:], weight_D.to(wide), bias_D.to(wide), eps
    )
    return y_TD, normed_TD.to(dtype), torch.cat([mean_T1, rstd_T1], 1).T.contiguous()


def backward(
    grad_y_TD: Tensor | None,
    grad_normed_TD: Tensor,
    y_TD: Tensor,
    weight_D: Tensor,
    stats_2T: Tensor,
    x_dtype: torch.dtype,
    update_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and update in their dtypes, of weight and bias in the weight's."""
    wide = stats_2T.dtype
    mean_T1, rstd_T1 = stats_2T[..., None]
    weight_wide_D = weight_D.to(wide)
    grad_TD, grad_weight_D, grad_bias_D = torch.ops.aten.native_layer_norm_backward(
        *(grad_normed_TD.to(wide).contiguous(), y_TD.to(wide), y_TD.shape[1:], mean_T1, rstd_T1),
        *(weight_wide_D, weight_wide_D, [True, True, True]),  # the bias is asked for its shape only
    )
    if grad_y_TD is not None:
        grad_TD = grad_TD + grad_y_TD
    return (
        grad_TD.to(x_dtype),
        grad_TD.to(update_dtype),
        grad_weight_D.to(weight_D.dtype),
        grad_bias_D.to(weight_D.dtype),
    )
