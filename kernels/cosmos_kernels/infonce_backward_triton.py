"""Backward of the multi-view contrastive loss in Triton: the gradient of the similarities, rectangle by rectangle.

    G_ij = exp(s - r_i) + exp(s - c_j) - 2 [j = offset + i],  dX = sum G Y,  dY = sum G^T X

See `infonce_triton.py` for the symbols, what is kept in which precision, and what is tested.

Axes: Va, Vb views, B rows, G columns, D embedding; in kernels i counts rows, j columns.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos_kernels import triton_support
from cosmos_kernels.infonce_chunks import Rectangle, padded_width, rectangles, workspace_elements
from cosmos_kernels.infonce_parts import (
    ahead_case,
    channels_last,
    dot_products,
    fit,
    launch_constants,
    tile_for,
    tile_of,
)
from cosmos_kernels.products import add_product

GRADIENT_BYTES = 32 << 20  # of workspace: it stays in the L2 cache of an A100 and newer
HALF_UNIT = 2.0**14  # fp16 holds G in steps of 2^-38, and 2 G below its maximum
SAFE_GRADIENT_RANGE: tl.constexpr = tl.constexpr(40.0)  # see _gradient_kernel


@triton.jit
def _gradient_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    row_lse_ptr,  # [Va, B, Vb], natural logarithms
    column_lse_ptr,  # [Va, Vb, G]
    g_ptr,  # [row_views * rows, pitch], of the rectangle that starts at the first_... below
    B,
    G,
    Vb,
    first_row_view,
    first_row,
    row_views,
    rows,
    first_column_view,
    first_column,
    column_views,
    columns,
    pitch,
    offset,
    stride_x_v,
    stride_x_b,
    stride_y_v,
    stride_y_g,
    D,
    UNIT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_B), tl.cdiv(columns, BLOCK_G)
    row, column = tile_of(tl.program_id(0), row_views * row_tiles, column_views * column_tiles, GROUP)
    view_a, tile_i = row // row_tiles, row % row_tiles
    view_b, tile_j = column // column_tiles, column % column_tiles
    within_i = tile_i * BLOCK_B + tl.arange(0, BLOCK_B)
    within_j = tile_j * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_i = first_row + tl.minimum(within_i, rows - 1)
    offs_j = first_column + tl.minimum(within_j, columns - 1)
    global_a = (first_row_view + view_a).to(tl.int64)
    global_b = (first_column_view + view_b).to(tl.int64)
    x_rows = x_ptr + global_a * stride_x_v + offs_i.to(tl.int64) * stride_x_b
    y_rows = y_ptr + global_b * stride_y_v + offs_j.to(tl.int64) * stride_y_g
    row_lse = tl.load(row_lse_ptr + (global_a * B + offs_i) * Vb + global_b)
    column_lse = tl.load(column_lse_ptr + (global_a * Vb + global_b) * G + offs_j)
    products = dot_products(x_rows, y_rows, D, BLOCK_B, BLOCK_G, BLOCK_D, EVEN_D, PRECISION, UPCAST)

    # With t the tile's largest row_lse no exp(s - t) exceeds 1; one that underflows, below exp(-87), would have counted
    # for at most exp(40 - 87).
    scale = tl.load(scale_ptr)
    high = tl.max(row_lse, 0)
    low = tl.minimum(tl.min(row_lse, 0), tl.min(column_lse, 0))
    if high - low < SAFE_GRADIENT_RANGE:
        factors = tl.exp(high - row_lse)[:, None] + tl.exp(high - column_lse)[None, :]
        gradient = tl.exp(products * scale - high) * factors
    else:
        logits = products * scale
        gradient = tl.exp(logits - row_lse[:, None]) + tl.exp(logits - column_lse[None, :])
    ahead = offset + first_row + tile_i * BLOCK_B - first_column - tile_j * BLOCK_G
    if (ahead < BLOCK_G) & (ahead > -BLOCK_B):
        gradient = tl.where((offs_i + offset)[:, None] == offs_j[None, :], gradient - 2.0, gradient)
    g_tile = g_ptr + (view_a * rows + tile_i * BLOCK_B).to(tl.int64) * pitch + view_b * columns + tile_j * BLOCK_G
    g = g_tile + (tl.arange(0, BLOCK_B)[:, None] * pitch + tl.arange(0, BLOCK_G)[None, :])
    mask = (within_i < rows)[:, None] & (within_j < columns)[None, :]
    tl.store(g, (gradient * UNIT).to(g_ptr.dtype.element_ty), mask=mask)


def feature_gradients(
    rows_VBD: Tensor,
    columns_VGD: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    offset: int,
    want_columns: bool,
) -> tuple[Tensor, Tensor]:
    """Backward stage: sums of G times the other side.

    Args: as `log_sum_exps`, with its first two results. want_columns: whether the columns' gradient is wanted.

    Returns:
        fp32 [Va, B, D], and fp32 [Vb, G, D], empty where not wanted.
    """
    rows_VBD, columns_VGD = channels_last(rows_VBD), channels_last(columns_VGD)
    (row_views, batch, dim), (column_views, total, _) = rows_VBD.shape, columns_VGD.shape
    new = torch.empty((), dtype=torch.float32, device=rows_VBD.device).new_empty
    grad_rows, grad_columns = new(rows_VBD.shape), new(columns_VGD.shape if want_columns else (0,))
    # Triton's interpreter rounds bf16 wrongly where it stores: there the workspace is fp32.
    dtype = torch.float32 if triton_support.upcast(rows_VBD.dtype) else rows_VBD.dtype
    parts = list(
        rectangles(row_views, batch, column_views, total, GRADIENT_BYTES // dtype.itemsize, square=want_columns)
    )
    workspace = torch.empty(max(map(workspace_elements, parts)), dtype=dtype, device=rows_VBD.device)
    unit = HALF_UNIT if dtype == torch.float16 else 1.0
    lse = row_lse.contiguous(), col_lse.contiguous()
    scale = scale.detach().float()
    with triton_support.launch_device(rows_VBD):
        for part in parts:
            g = _gradient_of(part, rows_VBD, columns_VGD, scale, *lse, offset, workspace, unit)
            rows, columns = (part.row_views, part.rows), (part.column_views, part.columns)
            first_columns = part.column_views.start == 0 and part.columns.start == 0
            add_product(
                grad_rows[rows].view(-1, dim),
                g,
                columns_VGD[columns].reshape(-1, dim).to(dtype),
                alpha=1 / unit,
                overwrite=first_columns,
            )
            if want_columns:
                add_product(
                    grad_columns[columns].view(-1, dim),
                    g.T,
                    rows_VBD[rows].reshape(-1, dim).to(dtype),
                    alpha=1 / unit,
                    overwrite=part.row_views.start == 0 and part.rows.start == 0,
                )
    return grad_rows, grad_columns


def _gradient_of(
    part: Rectangle,
    rows_VBD: Tensor,
    columns_VGD: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    offset: int,
    workspace: Tensor,
    unit: float,
) -> Tensor:
    """G of a rectangle times `unit`: [row views * rows, column views * columns], in the workspace."""
    views_a, rows, views_b, columns = (side.stop - side.start for side in part)
    pitch = padded_width(views_b * columns)
    tile = fit(tile_for(rows_VBD.dtype), rows, columns, rows_VBD.shape[2])
    row_tiles, column_tiles = views_a * triton.cdiv(rows, tile.block_b), views_b * triton.cdiv(columns, tile.block_g)
    _gradient_kernel[(row_tiles * column_tiles,)](
        *(rows_VBD, columns_VGD, scale, row_lse, col_lse, workspace),
        *(rows_VBD.shape[1], columns_VGD.shape[1], columns_VGD.shape[0]),
        *(part.row_views.start, part.rows.start, views_a, rows),
        *(part.column_views.start, part.columns.start, views_b, columns),
        *(pitch, offset, *rows_VBD.stride()[:2], *columns_VGD.stride()[:2], rows_VBD.shape[2]),
        UNIT=unit,
        **launch_constants(tile, rows_VBD),
    )
    return workspace[: views_a * rows * pitch].view(-1, pitch)[:, : views_b * columns]


COMPILE_AHEAD = [
    ahead_case("gradient", _gradient_kernel, torch.float16, UNIT=HALF_UNIT),
    ahead_case("gradient", _gradient_kernel, torch.float32, UNIT=1.0),
]
