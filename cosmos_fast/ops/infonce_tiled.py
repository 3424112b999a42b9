"""Stages of multi-view InfoNCE in PyTorch, tile by tile: the workspace is a tile, whatever the batch.

For rows x (view a, sample i) and columns y (view b, sample j), s = scale <x, y>. What the two stages return, and their
shapes, stands in `ops/infonce.py`. They compute in fp32, in fp64 for fp64 features.

Where the logits of a tile lie close together, one exponential an element serves both directions:

    forward    e = exp(s - t),  sum_j e and sum_i e
    backward   exp(s - row_lse_i) + exp(s - col_lse_j) = e (exp(t - row_lse_i) + exp(t - col_lse_j))

Axes: Va, Vb views, B rows, G columns, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 19  # logits held at a time: 2 MiB in fp32
SAFE_EXPONENT_RANGE = 80.0  # exp(-80) is still a normal fp32 number


class Tile(NamedTuple):
    row_views: slice
    rows: slice
    column_views: slice
    columns: slice


@torch.no_grad()
def log_sum_exps(rows_VBD: Tensor, columns_VGD: Tensor, scale: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps over the columns and over the rows, and the sum of the positives: see `ops/infonce.py`."""
    (row_views, batch, _), (column_views, total, _) = rows_VBD.shape, columns_VGD.shape
    dtype = compute_dtype(rows_VBD.dtype)
    with torch.autocast(rows_VBD.device.type, enabled=False):
        row_lse = rows_VBD.new_full((row_views, batch, column_views), -math.inf, dtype=dtype)
        col_lse = rows_VBD.new_full((row_views, column_views, total), -math.inf, dtype=dtype)
        bound = _logit_bound(rows_VBD, columns_VGD, scale)
        for tile in _tiles(row_views, batch, column_views, total):
            logits = _tile_logits(rows_VBD, columns_VGD, scale, tile)
            shift = _shared_shift(logits, bound)
            if shift is None:
                tile_rows, tile_cols = logits.logsumexp(3), logits.logsumexp(1)
            else:
                weights = logits.sub_(shift).exp_()
                tile_rows, tile_cols = weights.sum(3).log_().add_(shift), weights.sum(1).log_().add_(shift)
            row_slice = row_lse[tile.row_views, tile.rows, tile.column_views]
            row_slice.copy_(torch.logaddexp(row_slice, tile_rows))
            col_slice = col_lse[tile.row_views, tile.column_views, tile.columns]
            col_slice.copy_(torch.logaddexp(col_slice, tile_cols))
        return row_lse, col_lse, positives(rows_VBD, columns_VGD, scale, offset)


@torch.no_grad()
def feature_gradients(
    rows_VBD: Tensor,
    columns_VGD: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    offset: int,
    want_columns: bool,
) -> tuple[Tensor, Tensor]:
    """Sums of (exp(s - row_lse) + exp(s - col_lse) - 2 [j = offset + i]) times the other side: see `ops/infonce.py`."""
    (row_views, batch, dim), (column_views, total, _) = rows_VBD.shape, columns_VGD.shape
    dtype = compute_dtype(rows_VBD.dtype)
    with torch.autocast(rows_VBD.device.type, enabled=False):
        grad_rows = rows_VBD.new_zeros(rows_VBD.shape, dtype=dtype)
        grad_columns = columns_VGD.new_zeros(columns_VGD.shape if want_columns else (0,), dtype=dtype)
        for tile in _tiles(row_views, batch, column_views, total):
            grad = _tile_logits(rows_VBD, columns_VGD, scale, tile)
            _logits_to_gradient(
                grad,
                row_lse[tile.row_views, tile.rows, tile.column_views],
                col_lse[tile.row_views, tile.column_views, tile.columns],
                offset + tile.rows.start - tile.columns.start,
            )
            grad_2d = grad.view(grad.shape[0] * grad.shape[1], -1)
            columns_2d = _matrix(columns_VGD[tile.column_views, tile.columns], dtype)
            grad_rows[tile.row_views, tile.rows].view(-1, dim).addmm_(grad_2d, columns_2d)
            if want_columns:
                rows_2d = _matrix(rows_VBD[tile.row_views, tile.rows], dtype)
                grad_columns[tile.column_views, tile.columns].view(-1, dim).addmm_(grad_2d.T, rows_2d)
        return grad_rows, grad_columns


def positives(rows_VBD: Tensor, columns_VGD: Tensor, scale: Tensor, offset: int) -> Tensor:
    """Sum over all pairs of views and all rows i of scale <x_i, y_(offset + i)>: a product of two sums over views."""
    dtype = compute_dtype(rows_VBD.dtype)
    own_VBD = columns_VGD[:, offset : offset + rows_VBD.shape[1]]
    return scale.to(dtype) * torch.sum(rows_VBD.sum(0, dtype=dtype) * own_VBD.sum(0, dtype=dtype))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: fp32, or fp64 for fp64 features."""
    return torch.promote_types(dtype, torch.float32)


def _logits_to_gradient(logits: Tensor, row_lse: Tensor, col_lse: Tensor, diagonal: int) -> None:
    """In place: d loss / d logits of a tile [Va, B, Vb, G], up to the weight. diagonal: column of row 0's positive."""
    row_lse, col_lse = row_lse.unsqueeze(3), col_lse.unsqueeze(1)
    shift = _gradient_shift(row_lse, col_lse)
    if shift is None:
        columns_part = (logits - col_lse).exp_()
        logits.sub_(row_lse).exp_().add_(columns_part)
    else:
        logits.sub_(shift).exp_().mul_((shift - row_lse).exp_() + (shift - col_lse).exp_())
    if -logits.shape[1] < diagonal < logits.shape[3]:
        logits.diagonal(diagonal, dim1=1, dim2=3).sub_(2)


def _tile_logits(rows_VBD: Tensor, columns_VGD: Tensor, scale: Tensor, tile: Tile) -> Tensor:
    """Scaled similarities of a tile: [row views, rows, column views, columns], freshly allocated."""
    dtype = compute_dtype(rows_VBD.dtype)
    rows, columns = rows_VBD[tile.row_views, tile.rows], columns_VGD[tile.column_views, tile.columns]
    flat = (_matrix(rows, dtype) * scale) @ _matrix(columns, dtype).T
    return flat.view(rows.shape[0], rows.shape[1], columns.shape[0], columns.shape[1])


def _matrix(features: Tensor, dtype: torch.dtype) -> Tensor:
    return features.reshape(-1, features.shape[2]).to(dtype)


def _tiles(row_views: int, batch: int, column_views: int, total: int) -> Iterator[Tile]:
    """Cover the logits with tiles of at most TILE_ELEMENTS; a tile holds whole views or a part of one view."""
    column_chunk = min(total, max(1, TILE_ELEMENTS // min(batch, 128)))
    column_view_chunk = max(1, min(column_views, column_chunk // total))
    width = column_view_chunk * column_chunk
    row_chunk = min(batch, max(1, TILE_ELEMENTS // width))
    row_view_chunk = max(1, min(row_views, TILE_ELEMENTS // (width * batch)))
    for first_row_view in range(0, row_views, row_view_chunk):
        for first_row in range(0, batch, row_chunk):
            for first_column_view in range(0, column_views, column_view_chunk):
                for first_column in range(0, total, column_chunk):
                    yield Tile(
                        slice(first_row_view, min(first_row_view + row_view_chunk, row_views)),
                        slice(first_row, min(first_row + row_chunk, batch)),
                        slice(first_column_view, min(first_column_view + column_view_chunk, column_views)),
                        slice(first_column, min(first_column + column_chunk, total)),
                    )


def _logit_bound(rows_VBD: Tensor, columns_VGD: Tensor, scale: Tensor) -> float:
    """An upper bound of |s| from the largest norms (Cauchy-Schwarz)."""
    rows, columns = (
        torch.linalg.vector_norm(side, dim=2, dtype=compute_dtype(side.dtype)).amax()
        for side in (rows_VBD, columns_VGD)
    )
    return float(scale.abs() * rows * columns)


def _shared_shift(logits: Tensor, bound: float) -> float | None:
    """A shift under which one exponential serves rows and columns without underflow; None if there is none."""
    if 2 * bound < SAFE_EXPONENT_RANGE:
        return bound
    low, high = (float(value) for value in torch.aminmax(logits))
    return high if high - low < SAFE_EXPONENT_RANGE else None


def _gradient_shift(row_lse: Tensor, col_lse: Tensor) -> float | None:
    """A shift t under which one exponential serves both terms of the gradient; None if there is none.

    With t the largest row_lse no exp(s - t) exceeds 1. One that underflows (s < t - 87) belongs to gradients below
    exp(-87 + range), range being how far any row_lse or col_lse lies below t: with half of the safe range, to nothing.
    """
    high = float(row_lse.amax())
    low = min(float(row_lse.amin()), float(col_lse.amin()))
    return high if high - low < SAFE_EXPONENT_RANGE / 2 else None
