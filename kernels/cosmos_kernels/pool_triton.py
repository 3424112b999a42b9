"""Attention of a sample's pooling queries to its LayerNormed tokens, in Triton: the forward pass.

    x^_l = (x_l - mean_l) r_l     r_l = 1 / std_l
    S_ml = r_l (q_m . x_l - mean_l sum_d q_md)         P = softmax_l(S), lse = log sum_l exp S
    Z_m  = sum_l P_ml x^_l = sum_l (P_ml r_l) x_l - sum_l P_ml r_l mean_l

The LayerNorm is applied to scores and sums, never to the tokens, so both products read the tokens as they are. One
program a sample (and 64 rows): all scores [M, L] first, streaming D in chunks, an exact softmax, then Z chunk by chunk;
the tokens come from L2 the second time. L <= 256, so that a row of scores fits the registers.

Shapes: tokens [B, L, D], queries [B, M, D], Z [B, M, D], lse [B, M]. Tokens, queries and Z in fp32, bf16 or fp16;
products accumulate in fp32, everything else is fp32. Bytes moved: tokens and queries read once, Z and lse written.

Checked in Triton's interpreter and compiled for sm_80/sm_90/sm_100; not yet run on hardware.

Axes: B batch, L tokens, M rows of a sample (views times heads), D embedding.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos_kernels import triton_support
from cosmos_kernels.pool_backward_triton import attend_backward, moments_update
from cosmos_kernels.pool_parts import LAYER_NORM_EPS, MAX_ROWS, MAX_TOKENS, block_size, readable, stored_dtype
from cosmos_kernels.triton_support import AheadCase

__all__ = ["COMPILE_AHEAD", "attend", "attend_backward"]


@triton.jit
def _attend_kernel(
    x_ptr,
    q_ptr,
    z_ptr,
    lse_ptr,
    L,
    M,
    stride_x_b,
    stride_x_l,
    D: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_l = tl.arange(0, BLOCK_L)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < M
    mask_l = offs_l < L
    x_base = x_ptr + sample * stride_x_b  # 64-bit once; within a sample 32 bits do
    x_rows = offs_l[:, None] * stride_x_l
    q_base = q_ptr + sample * M * D
    z_base = z_ptr + sample * M * D
    q_rows = offs_m[:, None] * D

    scores = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    q_sum = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_L,), tl.float32)
    m2 = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(0, D, BLOCK_D):
        mask_d = start + offs_d[None, :] < D
        x = tl.load(x_base + x_rows + start + offs_d[None, :], mask=mask_l[:, None] & mask_d, other=0.0)
        q = tl.load(q_base + q_rows + start + offs_d[None, :], mask=mask_m[:, None] & mask_d, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            q = q.to(tl.float32)
        scores = tl.dot(q, tl.trans(x), scores, input_precision="ieee")
        q_sum += tl.sum(q.to(tl.float32), 1)
        count = tl.minimum(D - start, BLOCK_D).to(tl.float32)
        mean, m2 = moments_update(x.to(tl.float32), count, mean, m2, start, mask_d)

    rstd = 1.0 / tl.sqrt(m2 / D + EPS)
    scores = (scores - q_sum[:, None] * mean[None, :]) * rstd[None, :]
    scores = tl.where(mask_l[None, :], scores, -float("inf"))
    peak = tl.max(scores, 1)
    weights = tl.exp(scores - peak[:, None])
    total = tl.sum(weights, 1)
    tl.store(lse_ptr + sample * M + offs_m, peak + tl.log(total), mask=mask_m)

    # The largest weight of a row becomes 1: 1 / std of large tokens would leave the range of fp16.
    weights = weights * rstd[None, :]
    largest = tl.max(weights, 1)
    rounded = weights / largest[:, None]
    if not UPCAST:
        rounded = rounded.to(q_ptr.dtype.element_ty)
    # From the rounded weights, so that the mean of the tokens cancels to the last bit.
    offset = tl.sum(rounded.to(tl.float32) * mean[None, :], 1)
    factor = largest / total
    for start in range(0, D, BLOCK_D):
        mask_d = start + offs_d[None, :] < D
        x = tl.load(x_base + x_rows + start + offs_d[None, :], mask=mask_l[:, None] & mask_d, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
        z = (tl.dot(rounded, x, input_precision="ieee") - offset[:, None]) * factor[:, None]
        tl.store(z_base + q_rows + start + offs_d[None, :], z.to(z_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_d)


def attend(tokens_BLD: Tensor, queries_BMD: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax-weighted means of the normalised tokens.

    Args:
        tokens_BLD: [B, L, D], bf16 or fp16 (fp32 in the interpreter), L <= 256.
        queries_BMD: [B, M, D] of the same dtype, scaled.

    Returns:
        attended [B, M, D] in that dtype, and the log-sum-exps of the scores [B, M] in fp32.
    """
    tokens_BLD, queries_BMD = readable(tokens_BLD.detach()), queries_BMD.detach().contiguous()
    (batch, length, dim), rows = tokens_BLD.shape, queries_BMD.shape[1]
    assert length <= MAX_TOKENS, f"{length} tokens, at most {MAX_TOKENS}"
    attended_BMD = torch.empty_like(queries_BMD, dtype=stored_dtype(queries_BMD))
    lse_BM = torch.empty(batch, rows, dtype=torch.float32, device=queries_BMD.device)
    options = _options(length, dim, rows)
    with triton_support.launch_device(tokens_BLD):
        _attend_kernel[(batch, triton.cdiv(rows, options["BLOCK_M"]))](
            *(tokens_BLD, queries_BMD, attended_BMD, lse_BM, length, rows, *tokens_BLD.stride()[:2]),
            D=dim,
            EPS=LAYER_NORM_EPS,
            UPCAST=triton_support.upcast(tokens_BLD.dtype),
            **options,
        )
    return attended_BMD.to(queries_BMD.dtype), lse_BM


def _options(length: int, dim: int, rows: int) -> dict[str, int]:
    length_block = block_size(length, MAX_TOKENS)
    return {
        "BLOCK_M": block_size(rows, MAX_ROWS),
        "BLOCK_L": length_block,
        "BLOCK_D": block_size(dim, 32 if length_block > 128 else 64),  # 64 spill beside 256 tokens
        "num_warps": 8 if length_block > 64 else 4,
        "num_stages": 3,
    }


def _ahead(length: int, archs: tuple[int, ...]) -> AheadCase:
    """64 rows of 512 bf16 channels."""
    options = _options(length, 512, MAX_ROWS)
    return AheadCase(
        name=f"attend_kernel/L{length}",
        kernel=_attend_kernel,
        signature={
            **{f"{name}_ptr": "*bf16" for name in ("x", "q", "z")},
            "lse_ptr": "*fp32",
            **dict.fromkeys(("L", "M", "stride_x_b", "stride_x_l"), "i32"),
        },
        num_warps=options.pop("num_warps"),
        num_stages=options.pop("num_stages"),
        constexprs={"D": 512, "EPS": LAYER_NORM_EPS, "UPCAST": False, **options},
        divisible_by_16=("M", "stride_x_b", "stride_x_l"),
        archs=archs,
    )


COMPILE_AHEAD = [_ahead(77, triton_support.ARCHITECTURES), _ahead(196, (*triton_support.ARCHITECTURES, 89))]
