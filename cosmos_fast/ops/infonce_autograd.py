"""Multi-view InfoNCE as an operation with a gradient: the custom ops of its two stages, and the autograd function.

Which backend runs a stage is chosen inside the custom op; `cosmos_fast.ops.infonce` has the formula and the contract.

Axes: Va, Vb views, B per-rank batch, G columns (the global batch), D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosmos_fast.ops.backends import stages_for
from cosmos_fast.ops.first_order import first_order
from cosmos_fast.ops.infonce_checks import OP
from cosmos_fast.ops.infonce_ranks import Scattered
from cosmos_fast.ops.infonce_tiled import compute_dtype


@torch.library.custom_op("cosmos_fast::infonce_log_sum_exps", mutates_args=())
def log_sum_exps(
    rows: Tensor, columns: Tensor, scale: Tensor, offset: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(rows.device.type, enabled=False):
        return stages_for(OP, backend, rows, columns).log_sum_exps(rows, columns, scale, offset)


@log_sum_exps.register_fake
def _(rows: Tensor, columns: Tensor, scale: Tensor, offset: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    (row_views, batch, _), (column_views, total, _) = rows.shape, columns.shape
    dtype = compute_dtype(rows.dtype)
    row_lse = rows.new_empty((row_views, batch, column_views), dtype=dtype)
    return row_lse, rows.new_empty((row_views, column_views, total), dtype=dtype), rows.new_empty((), dtype=dtype)


@torch.library.custom_op("cosmos_fast::infonce_feature_gradients", mutates_args=())
def feature_gradients(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    offset: int,
    want_columns: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = stages_for(OP, backend, rows, columns).feature_gradients
    with torch.autocast(rows.device.type, enabled=False):
        return run(rows, columns, scale, row_lse, col_lse, offset, want_columns)


@feature_gradients.register_fake
def _(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    offset: int,
    want_columns: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(rows.dtype)
    return rows.new_empty(rows.shape, dtype=dtype), columns.new_empty(columns.shape if want_columns else 0, dtype=dtype)


class TermStatistics(NamedTuple):
    """What the forward pass of one term keeps. rows: in the dtype of the products. columns: [Vb, G, D] of the same.
    offset: column of row 0. row_lses: [V, B, Vb] of each tensor of rows. col_lse: [Va, Vb, G]. loss_sum: half the rows'
    log-sum-exps minus the positives, summed. scattered: how the columns' gradient gets to their ranks, None where the
    columns are this process's.
    """

    rows: list[Tensor]
    columns: Tensor
    scale: Tensor
    offset: int
    row_lses: list[Tensor]
    col_lse: Tensor
    loss_sum: Tensor
    scattered: Scattered | None = None


def term_statistics(
    parts: Sequence[Tensor], columns: Tensor, scale: Tensor, offset: int, dtype: torch.dtype, backend: str
) -> TermStatistics:
    """Both log-sum-exps over the rows and columns that are here; no gradient."""
    rows = [part.detach().to(dtype) for part in parts]
    scale = scale.detach().to(compute_dtype(dtype))
    found = [log_sum_exps(part, columns, scale, offset, backend) for part in rows]
    loss_sum = torch.stack([row_lse.sum() / 2 - positives for row_lse, _, positives in found]).sum()
    row_lses, col_lses = [row_lse for row_lse, _, _ in found], [cols for _, cols, _ in found]
    return TermStatistics(rows, columns, scale, offset, row_lses, torch.cat(col_lses), loss_sum)


class InfoNCE(torch.autograd.Function):
    """Columns, scale, then any number of tensors of rows. shared: the statistics over all ranks; None: all is here.

    Differentiable once: the gradients are no function of the features that autograd could see.
    """

    @staticmethod
    def forward(
        ctx: Any,
        b_VBD: Tensor,
        scale: Tensor,
        offset: int,
        shared: TermStatistics | None,
        dtype: torch.dtype,
        backend: str,
        *parts: Tensor,
    ) -> Tensor:
        term = shared
        if term is None:
            term = term_statistics(parts, b_VBD.detach().to(dtype), scale, offset, dtype, backend)
        col_lse, total, own = term.col_lse, term.columns.shape[1], parts[0].shape[1]
        if shared is not None:
            own = total  # columns whose loss counts
        elif own != total:
            # Foreign columns are negatives only: without a loss of their own they have no term in the gradient.
            col_lse[:, :, :offset] = math.inf
            col_lse[:, :, offset + own :] = math.inf
        loss_sum = term.loss_sum + (col_lse if own == total else col_lse[:, :, offset : offset + own]).sum() / 2
        pairs = col_lse.shape[0] * col_lse.shape[1] * own
        # The inputs, of which most are the same memory, for `first_order` alone.
        ctx.save_for_backward(b_VBD, scale, *parts, term.columns, term.scale, col_lse, *term.row_lses, *term.rows)
        ctx.offset, ctx.pairs, ctx.backend = offset, pairs, backend
        ctx.scattered = None if shared is None else shared.scattered
        ctx.dtypes = b_VBD.dtype, scale.dtype, parts[0].dtype
        return loss_sum / pairs

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        parts = len(ctx.needs_input_grad) - 6
        columns, scale, col_lse, *rest = ctx.saved_tensors[2 + parts :]
        row_lses, rows = rest[:parts], rest[parts:]
        want_columns = ctx.needs_input_grad[0]
        col_lses = col_lse.split([part.shape[0] for part in rows])
        weight = grad_loss / (2 * ctx.pairs)
        grad_columns: Tensor | None = None
        grad_scale = torch.zeros_like(scale)
        grads: list[Tensor | None] = []
        for i, part in enumerate(rows):
            grad, part_columns = feature_gradients(
                part, columns, scale, row_lses[i], col_lses[i], ctx.offset, want_columns, ctx.backend
            )
            # d loss / d scale = sum of (d loss / d s) s / scale = <d loss / d x, x> / scale: no pass over the logits.
            grad_scale = grad_scale + weight * _inner_product(grad, part)
            grads.append(grad.mul_(weight * scale).to(ctx.dtypes[2]))
            if want_columns:
                grad_columns = part_columns if grad_columns is None else grad_columns.add_(part_columns)
        if grad_columns is not None:
            grad_columns.mul_(weight * scale)
            if ctx.scattered is not None:
                grad_columns = ctx.scattered.begin(grad_columns)
            else:
                grad_columns = grad_columns.to(ctx.dtypes[0])
        return grad_columns, grad_scale.to(ctx.dtypes[1]), None, None, None, None, *grads


def _inner_product(grad_VBD: Tensor, features_VBD: Tensor) -> Tensor:
    """Sum of the products of all entries, view by view: the workspace is one view."""
    return torch.stack([torch.sum(grad * view) for grad, view in zip(grad_VBD, features_VBD, strict=True)]).sum()
