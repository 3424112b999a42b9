"""Gradients of the pooling's attention, in Triton, from the tokens and the log-sum-exps.

With the notation of `pool_triton`, and dZ the gradient of Z:

    P   = exp(S - lse)                    dP = dZ x^T
    dS  = P (dP - rowsum(P dP))           rowsum(P dP) = rowsum(dZ Z), so Z need not have been saved
    dq  = dS x^                           dx^ = P^T dZ + dS^T q
    dx  = r (dx^ - c1 - x^ c2)            c1 = mean_d dx^, c2 = mean_d dx^ x^: the backward pass of the LayerNorm

c1 and c2 need no dx^:

    c1_l = sum_m (P_ml sum_d dZ_md + dS_ml sum_d q_md) / D
    c2_l = sum_m (P_ml dP_ml + dS_ml S_ml) / D

So dx leaves chunk by chunk like everything else. Z is made again on the way, for the gradient of what follows it.

Two launches, because in one the scores of L = 256 spill: `_weights_kernel`, one program a sample and 32 rows, makes r P
and r dS in the dtype of the tokens, [B, L, M]; `_gradients_kernel`, one program a sample and D_SPLIT channels, the
products with them. M <= 64 (the launcher cuts what is more; at 32 where 256 tokens beside 64 rows are more than the
shared memory of sm_86, sm_89 and sm_120) and L <= 256. No atomics: the same bits every time.

fp16 would lose r P and r dS of large tokens or small losses: r P is divided by the largest r of the sample, r dS by a
power of two that makes the largest of a program 1; where a sample's powers differ, q takes the difference.

Bytes moved: tokens read three times (HBM once), queries and dZ twice; r P and r dS, Z, dq, dx written.

Checked in Triton's interpreter and compiled for sm_80/sm_89/sm_90/sm_100; not yet run on hardware.

Axes: B batch, L tokens, M rows of a sample (views times heads), D embedding.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos_kernels import triton_support
from cosmos_kernels.pool_parts import LAYER_NORM_EPS, MAX_ROWS, MAX_TOKENS, block_size, readable, stored_dtype
from cosmos_kernels.triton_support import AheadCase

WEIGHT_ROWS = 32  # rows of a program of `_weights_kernel`
CHANNELS = 256  # channels of a program of `_gradients_kernel`
# With all rows and more than LONG tokens, `_gradients_kernel` asks for this much on sm_80; it fits with SMALL_ROWS.
LONG, LARGE_SHARED_BYTES, SMALL_ROWS = 128, 147_456, 32


@triton.jit
def moments_update(x, count, mean, m2, seen, mask):
    """Merge a chunk x [L, D'] of `count` channels into the running mean and sum of squared deviations of its rows."""
    chunk_mean = tl.sum(x, 1) / count
    centred = tl.where(mask, x - chunk_mean[:, None], 0.0)
    delta = chunk_mean - mean
    total = seen + count
    mean += delta * (count / total)
    m2 += tl.sum(centred * centred, 1) + delta * delta * (seen * count / total)
    return mean, m2


@triton.jit
def _weights_kernel(
    x_ptr,
    q_ptr,
    lse_ptr,
    dz_ptr,
    weights_ptr,  # [B, L, M] r P / largest r
    dscores_ptr,  # [B, L, M] r dS / scale of the block
    tokens_ptr,  # [B, 2, L] mean, r
    sums_ptr,  # [B, blocks, 2, L] shares of r c1, r c2
    rows_ptr,  # [B, 2, M] what the mean of the tokens takes from Z and dq
    scales_ptr,  # [B, blocks]
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
    block = tl.program_id(1)
    blocks = tl.num_programs(1)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_l = tl.arange(0, BLOCK_L)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < M
    mask_l = offs_l < L
    x_base = x_ptr + sample * stride_x_b  # 64 bits once; within a sample 32 do
    q_base = q_ptr + sample * M * D
    dz_base = dz_ptr + sample * M * D

    # Transposed, [L, M]: the tokens are the long side of the tensor cores' tiles.
    scores = tl.zeros((BLOCK_L, BLOCK_M), tl.float32)
    dweights = tl.zeros((BLOCK_L, BLOCK_M), tl.float32)
    q_sum = tl.zeros((BLOCK_M,), tl.float32)
    dz_sum = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_L,), tl.float32)
    m2 = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(0, D, BLOCK_D):
        mask_d = start + offs_d[None, :] < D
        m_offs = offs_m[:, None] * D + start + offs_d[None, :]
        x_offs = offs_l[:, None] * stride_x_l + start + offs_d[None, :]
        x = tl.load(x_base + x_offs, mask=mask_l[:, None] & mask_d, other=0.0)
        q = tl.load(q_base + m_offs, mask=mask_m[:, None] & mask_d, other=0.0)
        dz = tl.load(dz_base + m_offs, mask=mask_m[:, None] & mask_d, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            q = q.to(tl.float32)
            dz = dz.to(tl.float32)
        scores = tl.dot(x, tl.trans(q), scores, input_precision="ieee")
        dweights = tl.dot(x, tl.trans(dz), dweights, input_precision="ieee")
        q_sum += tl.sum(q.to(tl.float32), 1)
        dz_sum += tl.sum(dz.to(tl.float32), 1)
        count = tl.minimum(D - start, BLOCK_D).to(tl.float32)
        mean, m2 = moments_update(x.to(tl.float32), count, mean, m2, start, mask_d)

    rstd = 1.0 / tl.sqrt(m2 / D + EPS)
    lse = tl.load(lse_ptr + sample * M + offs_m, mask=mask_m, other=0.0)
    scores = (scores - mean[:, None] * q_sum[None, :]) * rstd[:, None]
    dweights = (dweights - mean[:, None] * dz_sum[None, :]) * rstd[:, None]
    mask_lm = mask_l[:, None] & mask_m[None, :]
    weights = tl.where(mask_lm, tl.exp(scores - lse[None, :]), 0.0)
    products = weights * dweights
    dscores = products - weights * tl.sum(products, 0)[None, :]
    c2 = (tl.sum(products, 1) + tl.sum(dscores * scores, 1)) * rstd / D

    dtype = weights_ptr.dtype.element_ty
    largest = tl.max(tl.where(mask_l, rstd, 0.0), 0)
    dscores = dscores * rstd[:, None]
    scale = tl.max(tl.max(tl.abs(dscores), 1), 0)
    scale = tl.where(scale > 0.0, tl.exp2(tl.ceil(tl.log2(scale))), 1.0)
    weights = (weights * (rstd / largest)[:, None]).to(dtype)
    dscores = (dscores / scale).to(dtype)
    lm_base = sample * L * M
    lm_offs = offs_l[:, None] * M + offs_m[None, :]
    tl.store(weights_ptr + lm_base + lm_offs, weights, mask=mask_lm)
    tl.store(dscores_ptr + lm_base + lm_offs, dscores, mask=mask_lm)

    # What follows is taken from the rounded weights, so that means cancel to the last bit.
    weights = weights.to(tl.float32) * largest
    dscores = dscores.to(tl.float32) * scale
    c1 = (tl.sum(weights * dz_sum[None, :], 1) + tl.sum(dscores * q_sum[None, :], 1)) / D
    sums_base = sums_ptr + (sample * blocks + block) * 2 * L
    tl.store(sums_base + offs_l, c1, mask=mask_l)
    tl.store(sums_base + L + offs_l, c2, mask=mask_l)
    rows_base = rows_ptr + sample * 2 * M
    tl.store(rows_base + offs_m, tl.sum(weights * mean[:, None], 0), mask=mask_m)
    tl.store(rows_base + M + offs_m, tl.sum(dscores * mean[:, None], 0), mask=mask_m)
    tl.store(scales_ptr + sample * blocks + block, scale)
    if block == 0:
        tl.store(tokens_ptr + sample * 2 * L + offs_l, mean, mask=mask_l)
        tl.store(tokens_ptr + sample * 2 * L + L + offs_l, rstd, mask=mask_l)


@triton.jit
def _gradients_kernel(
    x_ptr,
    q_ptr,
    dz_ptr,
    weights_ptr,
    dscores_ptr,
    tokens_ptr,
    sums_ptr,
    rows_ptr,
    scales_ptr,
    z_ptr,
    dq_ptr,
    dx_ptr,
    L,
    M,
    stride_x_b,
    stride_x_l,
    D: tl.constexpr,
    D_SPLIT: tl.constexpr,  # channels of a program, a multiple of BLOCK_D
    BLOCK_M: tl.constexpr,  # all rows
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a block of `_weights_kernel`
    BLOCKS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * D_SPLIT
    offs_m = tl.arange(0, BLOCK_M)
    offs_l = tl.arange(0, BLOCK_L)
    offs_d = first + tl.arange(0, BLOCK_D)
    mask_m = offs_m < M
    mask_l = offs_l < L
    x_base = x_ptr + sample * stride_x_b
    dx_base = dx_ptr + sample * L * D
    rows_base = rows_ptr + sample * 2 * M
    md_base = sample * M * D

    lm_offs = sample * L * M + (offs_l[:, None] * M + offs_m[None, :])
    mask_lm = mask_l[:, None] & mask_m[None, :]
    weights = tl.load(weights_ptr + lm_offs, mask=mask_lm, other=0.0)
    dscores = tl.load(dscores_ptr + lm_offs, mask=mask_lm, other=0.0)
    mean = tl.load(tokens_ptr + sample * 2 * L + offs_l, mask=mask_l, other=0.0)
    rstd = tl.load(tokens_ptr + sample * 2 * L + L + offs_l, mask=mask_l, other=0.0)
    c1 = tl.zeros((BLOCK_L,), tl.float32)
    c2 = tl.zeros((BLOCK_L,), tl.float32)
    for block in range(0, BLOCKS):
        sums_base = sums_ptr + (sample * BLOCKS + block) * 2 * L
        c1 += tl.load(sums_base + offs_l, mask=mask_l, other=0.0)
        c2 += tl.load(sums_base + L + offs_l, mask=mask_l, other=0.0)
    z_offset = tl.load(rows_base + offs_m, mask=mask_m, other=0.0)
    dq_offset = tl.load(rows_base + M + offs_m, mask=mask_m, other=0.0)
    largest = tl.max(rstd, 0)
    row_scale = tl.load(scales_ptr + sample * BLOCKS + offs_m // ROWS, mask=mask_m, other=0.0)
    scale = tl.max(row_scale, 0)
    if UPCAST:
        weights = weights.to(tl.float32)
        dscores = dscores.to(tl.float32)

    for start in range(0, D_SPLIT, BLOCK_D):
        mask_d = start + offs_d[None, :] < D
        mask_md = mask_m[:, None] & mask_d
        mask_ld = mask_l[:, None] & mask_d
        m_offs = offs_m[:, None] * D + start + offs_d[None, :]
        x = tl.load(x_base + offs_l[:, None] * stride_x_l + start + offs_d[None, :], mask=mask_ld, other=0.0)
        q = tl.load(q_ptr + md_base + m_offs, mask=mask_md, other=0.0)
        dz = tl.load(dz_ptr + md_base + m_offs, mask=mask_md, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            q = q.to(tl.float32)
            dz = dz.to(tl.float32)
        z = tl.dot(tl.trans(weights), x, input_precision="ieee") * largest - z_offset[:, None]
        tl.store(z_ptr + md_base + m_offs, z.to(z_ptr.dtype.element_ty), mask=mask_md)
        dq = tl.dot(tl.trans(dscores), x, input_precision="ieee") * row_scale[:, None] - dq_offset[:, None]
        tl.store(dq_ptr + md_base + m_offs, dq.to(dq_ptr.dtype.element_ty), mask=mask_md)
        if BLOCKS > 1:
            q = (q.to(tl.float32) * (row_scale / scale)[:, None]).to(q.dtype)
        dx = tl.dot(dscores, q, input_precision="ieee") * scale
        dx += tl.dot(weights, dz, input_precision="ieee") * largest
        normed = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
        dx = dx - c1[:, None] - normed * c2[:, None]
        dx_offs = offs_l[:, None] * D + start + offs_d[None, :]
        tl.store(dx_base + dx_offs, dx.to(dx_ptr.dtype.element_ty), mask=mask_ld)


def attend_backward(
    tokens_BLD: Tensor, queries_BMD: Tensor, lse_BM: Tensor, grad_attended_BMD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `pool_triton.attend` from its inputs and log-sum-exps.

    Args:
        tokens_BLD, queries_BMD: as in the forward pass. lse_BM: what it returned, fp32.
        grad_attended_BMD: gradient of `attended`, in its dtype.

    Returns:
        attended [B, M, D] once more, grad_queries [B, M, D] and grad_tokens [B, L, D], all in the tokens' dtype.
    """
    most = _most_rows(tokens_BLD.shape[1], tokens_BLD.device)
    parts = [
        _attend_backward(tokens_BLD, *(x.contiguous() for x in rows))
        for rows in zip(*(x.detach().split(most, 1) for x in (queries_BMD, lse_BM, grad_attended_BMD)), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    attended, grad_queries, grad_tokens = zip(*parts, strict=True)
    return torch.cat(attended, 1), torch.cat(grad_queries, 1), torch.stack(grad_tokens).sum(0)


def _attend_backward(
    tokens_BLD: Tensor, queries_BMD: Tensor, lse_BM: Tensor, grad_attended_BMD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for at most MAX_ROWS contiguous rows a sample."""
    tokens_BLD = readable(tokens_BLD.detach())
    (batch, length, dim), rows = tokens_BLD.shape, queries_BMD.shape[1]
    assert length <= MAX_TOKENS, f"{length} tokens, at most {MAX_TOKENS}"
    dtype, device = stored_dtype(tokens_BLD), tokens_BLD.device
    row_block = block_size(rows, WEIGHT_ROWS)
    blocks = triton.cdiv(rows, row_block)
    weights_BLM, dscores_BLM = (torch.empty(batch, length, rows, dtype=dtype, device=device) for _ in range(2))
    tokens_B2L, sums_BN2L, rows_B2M, scales_BN = (
        torch.empty(batch, *shape, dtype=torch.float32, device=device)
        for shape in ((2, length), (blocks, 2, length), (2, rows), (blocks,))
    )
    attended_BMD, grad_queries_BMD = (torch.empty(batch, rows, dim, dtype=dtype, device=device) for _ in range(2))
    grad_tokens_BLD = torch.empty(batch, length, dim, dtype=dtype, device=device)
    made = (weights_BLM, dscores_BLM, tokens_B2L, sums_BN2L, rows_B2M, scales_BN)
    sizes = (length, rows, *tokens_BLD.stride()[:2])
    same = {"D": dim, "UPCAST": triton_support.upcast(tokens_BLD.dtype)}
    with triton_support.launch_device(tokens_BLD):
        _weights_kernel[(batch, blocks)](
            *(tokens_BLD, queries_BMD, lse_BM, grad_attended_BMD, *made, *sizes),
            **same,
            **_weights_options(length, dim, row_block),
        )
        _gradients_kernel[(batch, triton.cdiv(dim, CHANNELS))](
            *(tokens_BLD, queries_BMD, grad_attended_BMD, *made, attended_BMD, grad_queries_BMD, grad_tokens_BLD),
            *sizes,
            **same,
            **_gradients_options(length, dim, rows, row_block),
        )
    wanted = (attended_BMD, grad_queries_BMD, grad_tokens_BLD)
    attended_BMD, grad_queries_BMD, grad_tokens_BLD = (x.to(tokens_BLD.dtype) for x in wanted)
    return attended_BMD, grad_queries_BMD, grad_tokens_BLD


def _most_rows(length: int, device: torch.device) -> int:
    """Rows of one pair of launches: as many as the shared memory of the device allows."""
    small = length > LONG and triton_support.shared_bytes(device) < LARGE_SHARED_BYTES
    return SMALL_ROWS if small else MAX_ROWS


def _weights_options(length: int, dim: int, row_block: int) -> dict[str, int | float]:
    length_block = block_size(length, MAX_TOKENS)
    return {
        "EPS": LAYER_NORM_EPS,
        "BLOCK_M": row_block,
        "BLOCK_L": length_block,
        "BLOCK_D": block_size(dim, 64),
        "num_warps": 8 if length_block > 128 else 4,
        "num_stages": 3,
    }


def _gradients_options(length: int, dim: int, rows: int, row_block: int) -> dict[str, int]:
    length_block, channel_block = block_size(length, MAX_TOKENS), block_size(dim, 32)
    return {
        "D_SPLIT": triton.cdiv(min(dim, CHANNELS), channel_block) * channel_block,
        "BLOCK_M": block_size(rows, MAX_ROWS),
        "BLOCK_L": length_block,
        "BLOCK_D": channel_block,
        "ROWS": row_block,
        "BLOCKS": triton.cdiv(rows, row_block),
        "num_warps": 8 if length_block > 64 else 4,
        # 256 tokens: one stage keeps everything in the registers of sm_80 as well.
        "num_stages": 1 if length_block > LONG else 2,
    }


def _ahead(length: int, rows: int = MAX_ROWS, archs: tuple[int, ...] = triton_support.ARCHITECTURES) -> list[AheadCase]:
    """Both kernels for so many rows of 512 bf16 channels."""
    low = {f"{name}_ptr": "*bf16" for name in ("x", "q", "dz", "weights", "dscores")}
    full = {f"{name}_ptr": "*fp32" for name in ("tokens", "sums", "rows", "scales")}
    sizes = dict.fromkeys(("L", "M", "stride_x_b", "stride_x_l"), "i32")
    found = []
    for kernel, pointers, options in (
        (_weights_kernel, {**low, **full, "lse_ptr": "*fp32"}, _weights_options(length, 512, WEIGHT_ROWS)),
        (
            _gradients_kernel,
            {**low, **full, **{f"{name}_ptr": "*bf16" for name in ("z", "dq", "dx")}},
            _gradients_options(length, 512, rows, WEIGHT_ROWS),
        ),
    ):
        launch = int(options.pop("num_warps")), int(options.pop("num_stages"))
        found.append(
            AheadCase(
                name=f"{kernel.fn.__name__.strip('_')}/L{length}" + (f"/M{rows}" if rows < MAX_ROWS else ""),
                kernel=kernel,
                signature={**pointers, **sizes},
                constexprs={"D": 512, "UPCAST": False, **options},
                divisible_by_16=("M", "stride_x_b", "stride_x_l"),
                num_warps=launch[0],
                num_stages=launch[1],
                archs=archs,
            )
        )
    return found


COMPILE_AHEAD = [case for length in (77, 196) for case in _ahead(length)] + _ahead(196, SMALL_ROWS, (89,))
