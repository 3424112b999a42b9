"""Residual addition and LayerNorm as one operation: what stands between two branches of a transformer block.

    y = x + update,    normed = LayerNorm(y)

Both are results: y goes on as the residual stream, normed into the next branch. A backend is a namespace of two stage
functions with the contracts of `cosmos_kernels.layer_norm_triton`:

    forward(x, update, weight, bias, eps, dtype) -> y, normed, stats
    backward(grad_y or None, grad_normed, y, weight, stats, x_dtype, update_dtype) -> grads of x, update, weight, bias

Saved for backward: y (which the stream keeps anyway), the weight, mean and 1 / std of each row.

Axes: T rows, D channels.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from cosmos_fast.ops import layer_norm_eager
from cosmos_fast.ops.backends import Backend, register, stages_for
from cosmos_kernels import layer_norm_parts, triton_support

OP = "add_layer_norm"


def add_layer_norm(
    x_TD: Tensor,
    update_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x + update, and its LayerNorm. Statistics in fp32 (fp64 for fp64 input).

    Args:
        x_TD, update_TD: [T, D], fp64, fp32, bf16 or fp16; their dtypes may differ.
        weight_D, bias_D: [D], the LayerNorm's parameters.
        eps: added to the variance.
        backend: "auto", "triton" or "eager" (PyTorch).

    Returns:
        y [T, D] in the wider dtype of x and update; normed [T, D] in autocast's dtype under autocast, as the product
        that follows takes it, else in y's.

    Raises:
        ValueError: shapes that do not fit together, several devices, integers, or a backend that cannot run.
    """
    _check(x_TD, update_TD, weight_D, bias_D)
    device = x_TD.device.type
    dtype = torch.promote_types(x_TD.dtype, update_TD.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    y_TD, normed_TD, _ = _add_layer_norm(x_TD, update_TD, weight_D, bias_D, eps, dtype, backend)
    return y_TD, normed_TD


def _check(x_TD: Tensor, update_TD: Tensor, weight_D: Tensor, bias_D: Tensor) -> None:
    if x_TD.dim() != 2 or update_TD.shape != x_TD.shape:
        shapes = f"{tuple(x_TD.shape)} and {tuple(update_TD.shape)}"
        raise ValueError(f"{OP}: x_TD and update_TD have shapes {shapes}, expected the same [T, D]")
    for label, tensor in (("weight_D", weight_D), ("bias_D", bias_D)):
        if tensor.shape != x_TD.shape[1:]:
            raise ValueError(f"{OP}: {label} has shape {tuple(tensor.shape)}, expected ({x_TD.shape[1]},)")
    for label, tensor in (("x_TD", x_TD), ("update_TD", update_TD), ("weight_D", weight_D), ("bias_D", bias_D)):
        if tensor.device != x_TD.device or not tensor.is_floating_point():
            kind = f"{tensor.dtype} on {tensor.device}"
            raise ValueError(f"{OP}: {label} is {kind}, expected a floating-point type on {x_TD.device} like x_TD")


@torch.library.custom_op("cosmos_fast::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """y, normed, and the rows' mean and 1 / std [2, T]."""
    stages = stages_for(OP, backend, x, update, weight, bias)
    y, normed, stats = stages.forward(x, update, weight, bias, eps, dtype)
    return y, normed, stats


@_add_layer_norm.register_fake
def _(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    y_dtype = torch.promote_types(x.dtype, update.dtype)
    stats = x.new_empty((2, x.shape[0]), dtype=torch.promote_types(y_dtype, torch.float32))
    return x.new_empty(x.shape, dtype=y_dtype), x.new_empty(x.shape, dtype=dtype), stats


@torch.library.custom_op("cosmos_fast::add_layer_norm_backward", mutates_args=())
def _backward(
    grad_y: Tensor | None,
    grad_normed: Tensor,
    y: Tensor,
    weight: Tensor,
    stats: Tensor,
    x_dtype: torch.dtype,
    update_dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    """Gradients of x and update (one entry where their dtypes are equal), of weight and bias."""
    stages = stages_for(OP, backend, y, grad_normed, weight)  # about as many elements as in the forward pass
    grad_x, grad_update, *parameters = stages.backward(grad_y, grad_normed, y, weight, stats, x_dtype, update_dtype)
    return [grad_x, *([] if x_dtype == update_dtype else [grad_update]), *parameters]


@_backward.register_fake
def _(
    grad_y: Tensor | None,
    grad_normed: Tensor,
    y: Tensor,
    weight: Tensor,
    stats: Tensor,
    x_dtype: torch.dtype,
    update_dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    dtypes = [x_dtype] if x_dtype == update_dtype else [x_dtype, update_dtype]
    return [*(y.new_empty(y.shape, dtype=dtype) for dtype in dtypes), *(torch.empty_like(weight) for _ in range(2))]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, update, weight, bias, _, _, ctx.backend = inputs
    y, _, stats = output
    ctx.save_for_backward(y, weight, stats)
    ctx.x_dtype, ctx.update_dtype, ctx.bias_dtype = x.dtype, update.dtype, bias.dtype
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_y: Tensor | None, grad_normed: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    y, weight, stats = ctx.saved_tensors
    if grad_normed is None:
        of_x, of_update = (None if grad_y is None else grad_y.to(dtype) for dtype in (ctx.x_dtype, ctx.update_dtype))
        return of_x, of_update, None, None, None, None, None
    found = _backward(grad_y, grad_normed, y, weight, stats, ctx.x_dtype, ctx.update_dtype, ctx.backend)
    *of_rows, of_weight, of_bias = found
    return of_rows[0], of_rows[-1], of_weight, of_bias.to(ctx.bias_dtype), None, None, None


_add_layer_norm.register_autograd(_gradients, setup_context=_save)

register(
    Backend(
        OP,
        "triton",
        load=partial(import_module, "cosmos_kernels.layer_norm_triton"),
        summary="one pass over the rows in each direction; fp32, bf16 and fp16, at most 8192 channels",
        why_unavailable=triton_support.why_missing,
        why_unsupported=layer_norm_parts.why_unsupported,
        automatic=False,  # until it has been measured against the library
    ),
    Backend(OP, "eager", layer_norm_eager, "PyTorch's addition and LayerNorm"),
)
