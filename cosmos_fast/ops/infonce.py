"""Multi-view InfoNCE in one tiled pass: every pair of views, both directions, no stored logits.

For rows x (view a, sample i) and columns y (view b, sample j), s = scale <x, y>:

    loss = mean over (a, b, i) of  1/2 (logsumexp_j s + logsumexp_i s) - s_ii
    dL/ds = (exp(s - row_lse) + exp(s - col_lse) - 2 [i = j]) / (2 Va Vb G)

Forward keeps the two log-sum-exps only; backward recomputes each tile. Workspace is one tile, whatever the batch.
Across ranks the side with fewer views is gathered once; column log-sum-exps are merged; the gathered side's gradient
goes back by one reduce-scatter. The returned loss is that of the global batch, equal on every rank, and gradients are
exact shares: summed over ranks they are the gradient of one process that holds the whole batch.

Axes: Va, Vb views, B per-rank batch, G global batch, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_fast.ops.backends import Backend, register, resolve
from cosmos_kernels import reference

TILE_ELEMENTS = 1 << 19  # logits held at a time: 2 MiB in fp32
SAFE_EXPONENT_RANGE = 80.0  # exp(-80) is still a normal fp32 number


class Tile(NamedTuple):
    row_views: slice
    rows: slice
    column_views: slice
    columns: slice


def multiview_infonce(
    a_VBD: Tensor,
    b_VBD: Tensor,
    scale: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Symmetric InfoNCE averaged over every pair of a view of `a` and a view of `b`.

    Args:
        a_VBD: [Va, B, D] features, usually L2-normalised; fp64, fp32, bf16 or fp16.
        b_VBD: [Vb, B, D] features of the same samples, same dtype and device.
        scale: scalar tensor, the exponentiated temperature.
        group: process group that shares the global batch; None for this process alone.
        backend: "auto", "tiled" (no stored logits) or "eager" (the oracle; one process only).

    Returns:
        Scalar loss over the global batch, in fp32 (fp64 for fp64 input). With a group, the gradients of this process
        are its share of the exact gradient: sum them over ranks.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a backend that cannot run.
    """
    _check_arguments(a_VBD, b_VBD, scale)
    chosen, _ = resolve("multiview_infonce", backend, a_VBD, b_VBD)
    return chosen.run(a_VBD, b_VBD, scale, group)


class _TiledInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_VBD: Tensor, y_VBD: Tensor, scale: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        dtype = torch.float64 if x_VBD.dtype == torch.float64 else torch.float32
        rows_VBD = x_VBD.detach().to(dtype).contiguous()
        columns_VGD, offset = _gather_columns(y_VBD.detach().to(dtype).contiguous(), group)
        scale_value = scale.detach().to(dtype)
        row_lse, col_lse = _log_sum_exps(rows_VBD, columns_VGD, scale_value)
        batch = rows_VBD.shape[1]
        local_columns = columns_VGD[:, offset : offset + batch]
        positives = torch.einsum("abd,cbd->", rows_VBD, local_columns) * scale_value
        pairs = rows_VBD.shape[0] * columns_VGD.shape[0] * columns_VGD.shape[1]
        row_part = row_lse.sum() / 2 - positives
        if group is not None:
            col_lse = _merge_column_lse(col_lse, group)
            dist.all_reduce(row_part, group=group)
        ctx.save_for_backward(rows_VBD, columns_VGD, scale_value, row_lse, col_lse)
        ctx.pairs, ctx.offset, ctx.group = pairs, offset, group
        ctx.dtypes = x_VBD.dtype, y_VBD.dtype, scale.dtype
        return (row_part + col_lse.sum() / 2) / pairs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows_VBD, columns_VGD, scale, row_lse, col_lse = ctx.saved_tensors
        want_columns = ctx.needs_input_grad[1]
        grad_rows, grad_columns = _feature_gradients(
            rows_VBD, columns_VGD, scale, row_lse, col_lse, ctx.offset, want_columns
        )
        weight = grad_loss / (2 * ctx.pairs)
        # d loss / d scale = sum of (d loss / d s) * s / scale = <d loss / d x, x> / scale: no pass over the logits.
        grad_scale = (weight * torch.vdot(grad_rows.flatten(), rows_VBD.flatten())).to(ctx.dtypes[2])
        grad_rows *= weight * scale
        if grad_columns is not None:
            grad_columns *= weight * scale
            grad_columns = _scatter_columns(grad_columns, ctx.group).to(ctx.dtypes[1])
        return grad_rows.to(ctx.dtypes[0]), grad_columns, grad_scale, None


def _log_sum_exps(rows_VBD: Tensor, columns_VGD: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Row log-sum-exps [Va, B, Vb] over the columns, and column log-sum-exps [Va, Vb, G] over these rows."""
    (row_views, batch, _), (column_views, total, _) = rows_VBD.shape, columns_VGD.shape
    row_lse = rows_VBD.new_full((row_views, batch, column_views), -math.inf)
    col_lse = rows_VBD.new_full((row_views, column_views, total), -math.inf)
    bound = _logit_bound(rows_VBD, columns_VGD, scale)
    for tile in _tiles(row_views, batch, column_views, total):
        logits = _tile_logits(rows_VBD, columns_VGD, scale, tile)
        shift = _shared_shift(logits, bound)
        if shift is None:
            tile_rows, tile_cols = logits.logsumexp(3), logits.logsumexp(1)
        else:  # one exponential an element serves both directions
            weights = logits.sub_(shift).exp_()
            tile_rows, tile_cols = weights.sum(3).log_().add_(shift), weights.sum(1).log_().add_(shift)
        row_slice = row_lse[tile.row_views, tile.rows, tile.column_views]
        row_slice.copy_(torch.logaddexp(row_slice, tile_rows))
        col_slice = col_lse[tile.row_views, tile.column_views, tile.columns]
        col_slice.copy_(torch.logaddexp(col_slice, tile_cols))
    return row_lse, col_lse


def _feature_gradients(
    rows_VBD: Tensor,
    columns_VGD: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    offset: int,
    want_columns: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sums of (exp(s - row_lse) + exp(s - col_lse) - 2 delta) times the other side: [Va, B, D] and [Vb, G, D]."""
    (row_views, batch, dim), (column_views, total, _) = rows_VBD.shape, columns_VGD.shape
    grad_rows = torch.zeros_like(rows_VBD)
    grad_columns = torch.zeros_like(columns_VGD) if want_columns else None
    bound = _logit_bound(rows_VBD, columns_VGD, scale)
    for tile in _tiles(row_views, batch, column_views, total):
        grad = _tile_logits(rows_VBD, columns_VGD, scale, tile)
        tile_row_lse = row_lse[tile.row_views, tile.rows, tile.column_views].unsqueeze(3)
        tile_col_lse = col_lse[tile.row_views, tile.column_views, tile.columns].unsqueeze(1)
        shift = _shared_shift(grad, bound)
        if shift is None:
            grad = (grad - tile_row_lse).exp_().add_((grad - tile_col_lse).exp_())
        else:
            grad.sub_(shift).exp_().mul_((shift - tile_row_lse).exp_() + (shift - tile_col_lse).exp_())
        diagonal = offset + tile.rows.start - tile.columns.start
        if -grad.shape[1] < diagonal < grad.shape[3]:
            grad.diagonal(diagonal, dim1=1, dim2=3).sub_(2)
        grad_2d = grad.view(grad.shape[0] * grad.shape[1], -1)
        row_part = grad_rows[tile.row_views, tile.rows].view(-1, dim)
        row_part.addmm_(grad_2d, columns_VGD[tile.column_views, tile.columns].view(-1, dim))
        if grad_columns is not None:
            column_part = grad_columns[tile.column_views, tile.columns].view(-1, dim)
            column_part.addmm_(grad_2d.T, rows_VBD[tile.row_views, tile.rows].view(-1, dim))
    return grad_rows, grad_columns


def _tile_logits(rows_VBD: Tensor, columns_VGD: Tensor, scale: Tensor, tile: Tile) -> Tensor:
    """Scaled similarities of a tile: [row views, rows, column views, columns], freshly allocated."""
    rows = rows_VBD[tile.row_views, tile.rows]
    columns = columns_VGD[tile.column_views, tile.columns]
    flat = (rows.reshape(-1, rows.shape[2]) * scale) @ columns.reshape(-1, columns.shape[2]).T
    return flat.view(rows.shape[0], rows.shape[1], columns.shape[0], columns.shape[1])


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
    norms = torch.linalg.vector_norm(rows_VBD, dim=2).amax() * torch.linalg.vector_norm(columns_VGD, dim=2).amax()
    return float(scale.abs() * norms)


def _shared_shift(logits: Tensor, bound: float) -> float | None:
    """A shift under which one exponential serves rows and columns without underflow; None if there is none."""
    if 2 * bound < SAFE_EXPONENT_RANGE:
        return bound
    low, high = (float(value) for value in torch.aminmax(logits))
    return high if high - low < SAFE_EXPONENT_RANGE else None


def _gather_columns(y_VBD: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """All ranks' columns [Vb, G, D], and the column at which this rank's begin."""
    if group is None:
        return y_VBD, 0
    world, batch = dist.get_world_size(group), y_VBD.shape[1]
    gathered = y_VBD.new_empty(world, *y_VBD.shape)
    dist.all_gather_into_tensor(gathered.view(world * y_VBD.shape[0], *y_VBD.shape[1:]), y_VBD, group=group)
    return gathered.transpose(0, 1).flatten(1, 2).contiguous(), dist.get_rank(group) * batch


def _scatter_columns(grad_VGD: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's columns of the gradient summed over ranks: [Vb, B, D]."""
    if group is None:
        return grad_VGD
    world = dist.get_world_size(group)
    by_rank = grad_VGD.unflatten(1, (world, -1)).transpose(0, 1).contiguous()
    own = torch.empty_like(by_rank[0])
    dist.reduce_scatter_tensor(own, by_rank.flatten(0, 1), group=group)
    return own


def _merge_column_lse(col_lse: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Column log-sum-exps over the rows of all ranks."""
    peak = col_lse.clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    total = (col_lse - peak).exp_()
    dist.all_reduce(total, group=group)
    return total.log_().add_(peak)


def _run_tiled(a_VBD: Tensor, b_VBD: Tensor, scale: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    # The loss is symmetric: let the side with fewer views be the columns, which are what ranks exchange.
    if a_VBD.shape[0] < b_VBD.shape[0]:
        a_VBD, b_VBD = b_VBD, a_VBD
    with torch.autocast(a_VBD.device.type, enabled=False):
        return _TiledInfoNCE.apply(a_VBD, b_VBD, scale, group)


def _run_eager(a_VBD: Tensor, b_VBD: Tensor, scale: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        raise ValueError("multiview_infonce: the eager backend computes one process's batch; use tiled with a group")
    dtype = torch.promote_types(a_VBD.dtype, torch.float32)
    with torch.autocast(a_VBD.device.type, enabled=False):
        return reference.multiview_infonce(a_VBD.to(dtype), b_VBD.to(dtype), scale.to(dtype))


def _check_arguments(a_VBD: Tensor, b_VBD: Tensor, scale: Tensor) -> None:
    name = "multiview_infonce"
    for label, features in (("a_VBD", a_VBD), ("b_VBD", b_VBD)):
        if features.dim() != 3 or 0 in features.shape:
            raise ValueError(f"{name}: {label} has shape {tuple(features.shape)}, expected non-empty [views, batch, D]")
        if not features.is_floating_point():
            raise ValueError(f"{name}: {label} has dtype {features.dtype}, expected a floating-point dtype")
    if a_VBD.shape[1:] != b_VBD.shape[1:]:
        raise ValueError(
            f"{name}: b_VBD has shape {tuple(b_VBD.shape)}, expected [views, {a_VBD.shape[1]}, {a_VBD.shape[2]}] "
            "to match a_VBD"
        )
    if a_VBD.dtype != b_VBD.dtype or a_VBD.device != b_VBD.device:
        raise ValueError(
            f"{name}: b_VBD is {b_VBD.dtype} on {b_VBD.device}, expected {a_VBD.dtype} on {a_VBD.device} like a_VBD"
        )
    if scale.numel() != 1 or scale.dim() != 0:
        raise ValueError(f"{name}: scale has shape {tuple(scale.shape)}, expected a scalar tensor")


register(
    Backend("multiview_infonce", "tiled", _run_tiled, "PyTorch, tile by tile; no logits stored"),
    Backend("multiview_infonce", "eager", _run_eager, "the oracle: every pair by itself", automatic=False),
)
