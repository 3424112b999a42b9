"""Multi-view contrastive loss in Triton: both log-sum-exps in one matrix product, and the gradient of the similarities.

For rows x (view a, sample i) and columns y (view b, sample j), s = scale <x, y>:

    forward    r_abi = log sum_j exp s,  c_abj = log sum_i exp s,  p_abi = <x_i, y_(offset + i)>
    backward   G_ij  = exp(s - r_i) + exp(s - c_j) - 2 [j = offset + i],  dX = sum G Y,  dY = sum G^T X

Forward: a program computes a tile of s in one view of each side, keeps it in registers, and writes what the tile adds
to the log-sum-exps of its rows and columns; a second kernel merges tiles in a fixed order. One exponential an element
serves both directions wherever the tile's range allows. Backward: G of a rectangle is written in the
features' dtype (fp16: times 2^14, |G| <= 2) into a workspace that stays in L2; the library multiplies it by both
sides with fp32 sums. No atomics; the same bits every time.

Features [V, B, D] in fp32, bf16 or fp16, of any D, strides arbitrary (a copy where D is not contiguous). Dot
products accumulate in fp32; fp32 features are split in three TF32 products, which keeps their accuracy. Bytes moved at
the least: features twice, and a few per tile and row; both passes are bound by the products, 2 B G D a pair of views
forward, 4 backward, 6 with dY. Workspace: PARTIALS_BYTES forward, GRADIENT_BYTES backward.

Checked in Triton's interpreter and compiled for sm_80/sm_90/sm_100; not yet run on hardware.

Axes: Va, Vb views, B rows, G columns, D embedding; in kernels i counts rows, j columns.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos_kernels import triton_support
from cosmos_kernels.infonce_backward_triton import feature_gradients
from cosmos_kernels.infonce_chunks import pairs
from cosmos_kernels.infonce_parts import (
    ahead_case,
    channels_last,
    dot_products,
    fit,
    launch_constants,
    tile_for,
    tile_of,
)
from cosmos_kernels.triton_support import AheadCase

__all__ = ["COMPILE_AHEAD", "feature_gradients", "log_sum_exps"]

PARTIALS_BYTES = 32 << 20
SAFE_RANGE: tl.constexpr = tl.constexpr(70.0)  # exp(-70) / 2^24 is still a normal fp32 number


@triton.jit
def _log_sum_exps_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    row_partial_ptr,  # [views of the chunk, column tiles of a view, B]
    column_partial_ptr,  # [views of the chunk, row tiles of a view, G]
    positive_ptr,  # [Va, Vb, B]
    B,
    G,
    Vb,
    first_row_view,
    first_column_view,
    row_views,
    column_views,
    offset,
    stride_x_v,
    stride_x_b,
    stride_y_v,
    stride_y_g,
    D,
    BLOCK_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(B, BLOCK_B), tl.cdiv(G, BLOCK_G)
    row, column = tile_of(tl.program_id(0), row_views * row_tiles, column_views * column_tiles, GROUP)
    view_a, tile_i = row // row_tiles, row % row_tiles
    view_b, tile_j = column // column_tiles, column % column_tiles
    offs_i = tile_i * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_j = tile_j * BLOCK_G + tl.arange(0, BLOCK_G)
    # Past the ragged end the last row or column is repeated: it moves no maximum, and is left out of the sums.
    x_view = x_ptr + (first_row_view + view_a).to(tl.int64) * stride_x_v
    y_view = y_ptr + (first_column_view + view_b).to(tl.int64) * stride_y_v
    x_rows = x_view + tl.minimum(offs_i, B - 1).to(tl.int64) * stride_x_b
    y_rows = y_view + tl.minimum(offs_j, G - 1).to(tl.int64) * stride_y_g
    products = dot_products(x_rows, y_rows, D, BLOCK_B, BLOCK_G, BLOCK_D, EVEN_D, PRECISION, UPCAST)

    mask_i, mask_j = offs_i < B, offs_j < G
    ahead = offset + tile_i * BLOCK_B - tile_j * BLOCK_G
    if (ahead < BLOCK_G) & (ahead > -BLOCK_B):
        partner = offs_i + offset
        positives = tl.sum(tl.where(partner[:, None] == offs_j[None, :], products, 0.0), 1)
        here = (partner >= tile_j * BLOCK_G) & (partner < (tile_j + 1) * BLOCK_G) & mask_i
        whole_pair = (first_row_view + view_a).to(tl.int64) * Vb + first_column_view + view_b
        tl.store(positive_ptr + whole_pair * B + offs_i, positives, mask=here)

    scale = tl.load(scale_ptr)
    ends = tl.max(tl.max(products, 1), 0) * scale, tl.min(tl.min(products, 1), 0) * scale
    high, low = tl.maximum(ends[0], ends[1]), tl.minimum(ends[0], ends[1])
    if high - low < SAFE_RANGE:
        weights = tl.exp(products * scale - high)
        if not EVEN:
            weights = tl.where(mask_i[:, None] & mask_j[None, :], weights, 0.0)
        of_rows = high + tl.log(tl.sum(weights, 1))
        of_columns = high + tl.log(tl.sum(weights, 0))
    else:
        logits = products * scale
        row_high = tl.max(logits, 1)
        weights = tl.exp(logits - row_high[:, None])
        if not EVEN:
            weights = tl.where(mask_j[None, :], weights, 0.0)
        of_rows = row_high + tl.log(tl.sum(weights, 1))
        column_high = tl.max(logits, 0)
        weights = tl.exp(logits - column_high[None, :])
        if not EVEN:
            weights = tl.where(mask_i[:, None], weights, 0.0)
        of_columns = column_high + tl.log(tl.sum(weights, 0))
    pair = (view_a * column_views + view_b).to(tl.int64)
    tl.store(row_partial_ptr + (pair * column_tiles + tile_j) * B + offs_i, of_rows, mask=mask_i)
    tl.store(column_partial_ptr + (pair * row_tiles + tile_i) * G + offs_j, of_columns, mask=mask_j)


@triton.jit
def _merge_kernel(
    partial_ptr,  # [first, second, T, N]
    out_ptr,
    T,
    N,
    second_views,
    stride_first,
    stride_second,
    stride_n,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = log(sum over t of exp(partial)), for each pair of views (program axis 1) and each n."""
    pair = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    high = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, T, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask = (offs_t < T)[:, None] & mask_n[None, :]
        partial = tl.load(
            partial_ptr + (pair * T + offs_t)[:, None] * N + offs_n[None, :], mask=mask, other=-float("inf")
        )
        higher = tl.maximum(high, tl.max(partial, 0))
        higher = tl.where(mask_n, higher, 0.0)
        total = total * tl.exp(high - higher) + tl.sum(tl.exp(partial - higher[None, :]), 0)
        high = higher
    out = out_ptr + (pair // second_views) * stride_first + (pair % second_views) * stride_second
    tl.store(out + offs_n.to(tl.int64) * stride_n, high + tl.log(total), mask=mask_n)


def log_sum_exps(rows_VBD: Tensor, columns_VGD: Tensor, scale: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """Forward stage.

    Args:
        rows_VBD, columns_VGD: [Va, B, D] and [Vb, G, D] of one dtype out of DTYPES. scale: 0-dim, on their device.
        offset: the column that belongs to row 0.

    Returns:
        fp32 [Va, B, Vb] over the columns, [Va, Vb, G] over the rows (natural logarithms), and the 0-dim sum of
        scale <x_i, y_(offset + i)>.
    """
    rows_VBD, columns_VGD = channels_last(rows_VBD), channels_last(columns_VGD)
    (row_views, batch, dim), (column_views, total, _) = rows_VBD.shape, columns_VGD.shape
    tile = fit(tile_for(rows_VBD.dtype), batch, total, dim)
    row_tiles, column_tiles = triton.cdiv(batch, tile.block_b), triton.cdiv(total, tile.block_g)
    new = torch.empty((), dtype=torch.float32, device=rows_VBD.device).new_empty
    row_lse, col_lse = new(row_views, batch, column_views), new(row_views, column_views, total)
    positives = new(row_views, column_views, batch)
    scale = scale.detach().float()
    a_pair = 4 * (column_tiles * batch + row_tiles * total)
    with triton_support.launch_device(rows_VBD):
        for first_a, views_a, first_b, views_b in pairs(row_views, column_views, PARTIALS_BYTES // a_pair):
            row_partial, column_partial = (
                new(views_a * views_b, column_tiles, batch),
                new(views_a * views_b, row_tiles, total),
            )
            _log_sum_exps_kernel[(views_a * row_tiles * views_b * column_tiles,)](
                *(rows_VBD, columns_VGD, scale, row_partial, column_partial, positives),
                *(batch, total, column_views, first_a, first_b, views_a, views_b, offset),
                *(*rows_VBD.stride()[:2], *columns_VGD.stride()[:2], dim),
                EVEN=batch % tile.block_b == 0 and total % tile.block_g == 0,
                **launch_constants(tile, rows_VBD),
            )
            _merge(row_partial, row_lse[first_a : first_a + views_a, :, first_b : first_b + views_b].transpose(1, 2))
            _merge(column_partial, col_lse[first_a : first_a + views_a, first_b : first_b + views_b])
    return row_lse, col_lse, positives.sum() * scale


def _merge(partial: Tensor, out: Tensor) -> None:
    """partial [pairs, T, N] of one chunk into out [first, second, N], any strides, with first * second pairs."""
    pairs, tiles, size = partial.shape
    block_t, block_n = min(32, triton.next_power_of_2(tiles)), min(128, triton.next_power_of_2(size))
    _merge_kernel[(triton.cdiv(size, block_n), pairs)](
        *(partial, out, tiles, size, out.shape[1], *out.stride()), BLOCK_T=block_t, BLOCK_N=block_n, num_warps=4
    )


COMPILE_AHEAD = [
    *(ahead_case("forward", _log_sum_exps_kernel, dtype, EVEN=True) for dtype in (torch.float16, torch.float32)),
    AheadCase(
        name="merge",
        kernel=_merge_kernel,
        signature={"partial_ptr": "*fp32", "out_ptr": "*fp32"}
        | dict.fromkeys(("T", "N", "second_views", "stride_first", "stride_second", "stride_n"), "i32"),
        constexprs={"BLOCK_T": 32, "BLOCK_N": 128},
        divisible_by_16=("N", "stride_first", "stride_second"),
    ),
]
