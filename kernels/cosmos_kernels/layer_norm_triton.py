"""Residual addition and LayerNorm in one pass, in Triton, with its gradients.

    y = x + u          n = (y - mean) r gamma + beta          r = 1 / sqrt(var + eps), of each row

    g = dn gamma       dy' = dy + r (g - mean_d g - x^ mean_d (g x^))          x^ = (y - mean) r
    dgamma = sum_t dn x^          dbeta = sum_t dn

y and n are both results; dy' is the gradient of x and of u. The row lies in registers between its two sums, so variance
is of centred values, from one read. dgamma and dbeta in two stages: a program sums every P-th row in registers and
writes its [2, D]; the library adds the P of them. No atomics: the same bits every time on a kind of GPU.

Shapes: x, u [T, D] (rows at any stride), gamma, beta [D], D <= 8192; fp32, bf16 or fp16; y in the wider of x and u,
n in the dtype asked for; sums in fp32. Bytes moved: forward x, u read, y, n written; backward y, dn, dy read, dx
written, and du where its dtype is another.

Checked in Triton's interpreter and compiled for sm_80/sm_90/sm_100; not yet run on hardware.

Axes: T rows, D channels, P programs of the backward pass.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos_kernels import triton_support
from cosmos_kernels.layer_norm_parts import MAX_DIM
from cosmos_kernels.pool_parts import block_size, stored_dtype
from cosmos_kernels.triton_support import AheadCase

FORWARD_ROWS = 4  # of a program, one after the other: gamma and beta are loaded once for them
PROGRAMS_PER_PROCESSOR = 8  # of the backward pass


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    x_ptr,
    update_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    normed_ptr,
    stats_ptr,  # [2, T] mean, 1 / std
    T,
    stride_x_t,
    stride_update_t,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    first = tl.program_id(0) * ROWS
    for index in range(first, tl.minimum(first + ROWS, T)):
        row = tl.cast(index, tl.int64)
        x = tl.load(x_ptr + row * stride_x_t + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        update = tl.load(update_ptr + row * stride_update_t + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        y = (x + update).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row * D + offs_d, y, mask=mask_d)
        y = y.to(tl.float32)  # statistics are of what is stored, as backward reads it
        mean = tl.sum(y, 0) / D
        centred = tl.where(mask_d, y - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
        normed = centred * rstd * weight + bias
        tl.store(normed_ptr + row * D + offs_d, normed.to(normed_ptr.dtype.element_ty), mask=mask_d)
        tl.store(stats_ptr + row, mean)
        tl.store(stats_ptr + T + row, rstd)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    y_ptr,
    weight_ptr,
    stats_ptr,
    grad_y_ptr,
    grad_normed_ptr,
    grad_x_ptr,
    grad_update_ptr,
    partials_ptr,  # [P, 2, D] shares of dgamma, dbeta
    T,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_GRAD_Y: tl.constexpr,
    TWO_DTYPES: tl.constexpr,  # the gradient of the update is stored apart
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK_D,), tl.float32)
    grad_bias = tl.zeros((BLOCK_D,), tl.float32)
    for index in range(program, T, programs):
        row = tl.cast(index, tl.int64)
        y = tl.load(y_ptr + row * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        grad_normed = tl.load(grad_normed_ptr + row * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + row)
        rstd = tl.load(stats_ptr + T + row)
        normed = tl.where(mask_d, (y - mean) * rstd, 0.0)
        grad_weight += grad_normed * normed
        grad_bias += grad_normed
        grad = grad_normed * weight
        grad = (grad - tl.sum(grad, 0) / D - normed * (tl.sum(grad * normed, 0) / D)) * rstd
        if HAS_GRAD_Y:
            grad += tl.load(grad_y_ptr + row * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * D + offs_d, grad.to(grad_x_ptr.dtype.element_ty), mask=mask_d)
        if TWO_DTYPES:
            tl.store(grad_update_ptr + row * D + offs_d, grad.to(grad_update_ptr.dtype.element_ty), mask=mask_d)
    share = partials_ptr + program * 2 * D + offs_d
    tl.store(share, grad_weight, mask=mask_d)
    tl.store(share + D, grad_bias, mask=mask_d)


def forward(
    x_TD: Tensor, update_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x + update, its LayerNorm, and the statistics of its rows.

    Args:
        x_TD, update_TD: [T, D]. weight_D, bias_D: [D]. dtype: of the normalised result.

    Returns:
        y [T, D] in the wider dtype of x and update, normed [T, D] in `dtype`, stats [2, T] fp32: mean and 1 / std.
    """
    x_TD, update_TD = (_rows_readable(x.detach()) for x in (x_TD, update_TD))
    rows, dim = x_TD.shape
    y_dtype = torch.promote_types(x_TD.dtype, update_TD.dtype)
    y_TD = torch.empty(rows, dim, dtype=_stored(y_dtype), device=x_TD.device)
    normed_TD = torch.empty(rows, dim, dtype=_stored(dtype), device=x_TD.device)
    stats_2T = torch.empty(2, rows, dtype=torch.float32, device=x_TD.device)
    if rows:
        with triton_support.launch_device(x_TD):
            _forward_kernel[(triton.cdiv(rows, FORWARD_ROWS),)](
                *(x_TD, update_TD, weight_D.detach().contiguous(), bias_D.detach().contiguous()),
                *(y_TD, normed_TD, stats_2T, rows, x_TD.stride(0), update_TD.stride(0), eps),
                D=dim,
                ROWS=FORWARD_ROWS,
                **_options(dim, 1024),
            )
    return y_TD.to(y_dtype), normed_TD.to(dtype), stats_2T


def backward(
    grad_y_TD: Tensor | None,
    grad_normed_TD: Tensor,
    y_TD: Tensor,
    weight_D: Tensor,
    stats_2T: Tensor,
    x_dtype: torch.dtype,
    update_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward` from what it returned; `grad_y_TD` is None where y is read no further.

    Returns:
        grad_x and grad_update [T, D] in the dtypes given (one tensor where they are equal), grad_weight and grad_bias
        [D] in the weight's dtype.
    """
    grad_normed_TD, y_TD = grad_normed_TD.detach().contiguous(), y_TD.detach().contiguous()
    grad_y_TD = grad_normed_TD if grad_y_TD is None else grad_y_TD.detach().contiguous()
    rows, dim = y_TD.shape
    programs = max(1, min(rows, PROGRAMS_PER_PROCESSOR * _processors(y_TD.device)))
    two = x_dtype != update_dtype
    grad_x_TD = torch.empty(rows, dim, dtype=_stored(x_dtype), device=y_TD.device)
    grad_update_TD = torch.empty(rows, dim, dtype=_stored(update_dtype), device=y_TD.device) if two else grad_x_TD
    partials_P2D = torch.empty(programs, 2, dim, dtype=torch.float32, device=y_TD.device)
    with triton_support.launch_device(y_TD):
        _backward_kernel[(programs,)](
            *(y_TD, weight_D.detach().contiguous(), stats_2T, grad_y_TD, grad_normed_TD),
            *(grad_x_TD, grad_update_TD, partials_P2D, rows),
            D=dim,
            HAS_GRAD_Y=grad_y_TD is not grad_normed_TD,
            TWO_DTYPES=two,
            **_options(dim, 512),
        )
    grad_weight_D, grad_bias_D = (partials_P2D[:, i].sum(0).to(weight_D.dtype) for i in range(2))
    grad_x_TD = grad_x_TD.to(x_dtype)
    return grad_x_TD, grad_update_TD.to(update_dtype) if two else grad_x_TD, grad_weight_D, grad_bias_D


def _options(dim: int, channels_a_warp: int) -> dict[str, int]:
    """One warp a row as long as its registers allow: then sums need no shared memory."""
    block = block_size(dim, MAX_DIM)
    return {"BLOCK_D": block, "num_warps": max(1, min(16, block // channels_a_warp))}


def _rows_readable(x_TD: Tensor) -> Tensor:
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()


def _stored(dtype: torch.dtype) -> torch.dtype:
    return stored_dtype(torch.empty(0, dtype=dtype))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _ahead(dim: int, stream: str) -> list[AheadCase]:
    """bf16 updates and results beside a residual stream in fp32 (autocast) or bf16."""
    low = "*bf16"
    forward_options, backward_options = _options(dim, 1024), _options(dim, 512)
    parameters = {"weight_ptr": "*fp32", "stats_ptr": "*fp32", "T": "i32"}
    return [
        AheadCase(
            name=f"forward_kernel/D{dim}/{stream}",
            kernel=_forward_kernel,
            signature={
                **parameters,
                **{"bias_ptr": "*fp32", "x_ptr": f"*{stream}", "y_ptr": f"*{stream}", "eps": "fp32"},
                **{"update_ptr": low, "normed_ptr": low, "stride_x_t": "i32", "stride_update_t": "i32"},
            },
            num_warps=forward_options.pop("num_warps"),
            constexprs={"D": dim, "ROWS": FORWARD_ROWS, **forward_options},
            divisible_by_16=("stride_x_t", "stride_update_t"),
        ),
        AheadCase(
            name=f"backward_kernel/D{dim}/{stream}",
            kernel=_backward_kernel,
            signature={
                **parameters,
                **{f"{name}_ptr": f"*{stream}" for name in ("y", "grad_y", "grad_x")},
                **{"grad_normed_ptr": low, "grad_update_ptr": low, "partials_ptr": "*fp32"},
            },
            num_warps=backward_options.pop("num_warps"),
            constexprs={"D": dim, "HAS_GRAD_Y": True, "TWO_DTYPES": stream != "bf16", **backward_options},
        ),
    ]


COMPILE_AHEAD = [case for dim in (512, 768) for stream in ("fp32", "bf16") for case in _ahead(dim, stream)]
