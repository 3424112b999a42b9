"""Multi-view InfoNCE in one pass: every pair of views, both directions, no stored logits.

For rows x (view a, sample i) and columns y (view b, sample j), s = scale <x, y>; the positive of row i is column
offset + i:

    loss = mean over (a, b, i) of  1/2 (logsumexp_j s_ij + logsumexp_i' s_i',offset+i) - s_i,offset+i
    dL/ds = (exp(s - row_lse) + exp(s - col_lse) - 2 [j = offset + i]) / (2 pairs of rows)

Forward keeps the two log-sum-exps only; backward recomputes the logits. Across ranks the columns are gathered once,
column log-sum-exps are merged, and the columns' gradient goes back by one reduce-scatter.

A backend is a namespace with two stage functions. They take features of one dtype, any strides, and a 0-dim scale:

    log_sum_exps(rows [Va, B, D], columns [Vb, G, D], scale, offset)
        -> row_lse [Va, B, Vb], col_lse [Va, Vb, G], and 0-dim: the sum of scale <x_i, y_(offset+i)> over all pairs
    feature_gradients(rows, columns, scale, row_lse, col_lse, offset, want_columns)
        -> grad_rows [Va, B, D], grad_columns [Vb, G, D] (empty if not wanted), with G_ij = exp(s - row_lse)
           + exp(s - col_lse) - 2 [j = offset + i]: the sums of G_ij y_j over b and j, and of G_ij x_i over a and i

All results are fp32 (fp64 from the tiled backend for fp64 features). col_lse may be infinite: no such term.

Axes: Va, Vb views, B per-rank batch, G columns (the global batch), D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cosmos_fast.ops import infonce_tiled
from cosmos_fast.ops.backends import Backend, register, stages_for
from cosmos_fast.ops.infonce_checks import OP, check_arguments
from cosmos_fast.ops.infonce_ranks import Ranks
from cosmos_fast.ops.infonce_tiled import compute_dtype
from cosmos_fast.utils.phases import PhaseClock, no_clock
from cosmos_kernels import infonce_cuda, native, reference, triton_support

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_MAX_DIM = 8192  # the largest tested


def multiview_infonce(
    a_VBD: Tensor | Sequence[Tensor],
    b_VBD: Tensor,
    scale: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    offset: int = 0,
    operand_dtype: torch.dtype | None = None,
    backend: str = "auto",
    clock: PhaseClock = no_clock,
) -> Tensor:
    """Symmetric InfoNCE averaged over every pair of a view of `a` and a view of `b`.

    Args:
        a_VBD: [Va, B, D] features, usually L2-normalised; fp64, fp32, bf16 or fp16. A sequence of such tensors stands
            for their concatenation over views, without the copy.
        b_VBD: [Vb, B, D] features of the same samples, same dtype and device. Without a group it may hold more samples,
            [Vb, G, D]: the others are negatives of every row, and no rows themselves.
        scale: scalar tensor, the exponentiated temperature.
        group: process group that shares the global batch; None for this process alone.
        offset: sample of `b` that belongs to sample 0 of `a`; only where `b` holds more samples.
        operand_dtype: dtype that features are rounded to for the matrix products (and for the gather), such as
            torch.float16 for features of unit norm; sums stay in fp32, gradients in the features' own dtype. None: no
            rounding.
        backend: "auto", "tiled" (PyTorch), "triton", "cuda", or "eager" (the oracle; one process only).
        clock: told of the group's collectives, also of those in the backward pass.

    Returns:
        Scalar loss over the global batch, in fp32 (fp64 for fp64 features), equal on every rank. With a group, the
        gradients of this process are its share of the exact gradient: summed over ranks they are that of one process
        that holds the whole batch.

    Raises:
        ValueError: shapes, dtypes, devices or an offset that do not fit together, or a backend that cannot run.
    """
    parts = [a_VBD] if isinstance(a_VBD, Tensor) else list(a_VBD)
    check_arguments(parts, b_VBD, scale, offset, operand_dtype, group)
    if backend == "eager":
        if operand_dtype is not None:
            parts, b_VBD = [_rounded(part, operand_dtype) for part in parts], _rounded(b_VBD, operand_dtype)
        return _run_eager(parts, b_VBD, scale, offset, group)
    if b_VBD.shape[1] == parts[0].shape[1] and _rather_columns(parts, b_VBD):
        parts, b_VBD = [b_VBD], parts[0] if len(parts) == 1 else torch.cat(parts)
    dtype = parts[0].dtype if operand_dtype is None else operand_dtype
    ranks = None if group is None else Ranks(group, clock)
    return _InfoNCE.apply(b_VBD, scale, offset, ranks, dtype, backend, *parts)


def _rather_columns(parts: list[Tensor], b_VBD: Tensor) -> bool:
    """Whether `a` should be the columns: the side without gradient is, else the one with fewer views.

    The loss is symmetric. Columns are what ranks exchange, and a gradient of theirs costs a product of its own.
    """
    wanted = any(part.requires_grad for part in parts)
    if wanted != b_VBD.requires_grad:
        return b_VBD.requires_grad
    return sum(part.shape[0] for part in parts) < b_VBD.shape[0]


@torch.library.custom_op("cosmos_fast::infonce_log_sum_exps", mutates_args=())
def _log_sum_exps(
    rows: Tensor, columns: Tensor, scale: Tensor, offset: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(rows.device.type, enabled=False):
        return stages_for(OP, backend, rows, columns).log_sum_exps(rows, columns, scale, offset)


@_log_sum_exps.register_fake
def _(rows: Tensor, columns: Tensor, scale: Tensor, offset: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    (row_views, batch, _), (column_views, total, _) = rows.shape, columns.shape
    dtype = compute_dtype(rows.dtype)
    row_lse = rows.new_empty((row_views, batch, column_views), dtype=dtype)
    return row_lse, rows.new_empty((row_views, column_views, total), dtype=dtype), rows.new_empty((), dtype=dtype)


@torch.library.custom_op("cosmos_fast::infonce_feature_gradients", mutates_args=())
def _feature_gradients(
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


@_feature_gradients.register_fake
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


class _InfoNCE(torch.autograd.Function):
    """Columns, scale, then any number of tensors of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        b_VBD: Tensor,
        scale: Tensor,
        offset: int,
        ranks: Ranks | None,
        dtype: torch.dtype,
        backend: str,
        *parts: Tensor,
    ) -> Tensor:
        rows = [part.detach().to(dtype) for part in parts]
        columns, batch = b_VBD.detach().to(dtype), parts[0].shape[1]
        if ranks is not None:
            columns, offset = ranks.gather_columns(columns)
        scale_value = scale.detach().to(compute_dtype(dtype))
        found = [_log_sum_exps(part, columns, scale_value, offset, backend) for part in rows]
        col_lse = torch.cat([cols for _, cols, _ in found])
        loss_sum = torch.stack([row_lse.sum() / 2 - positives for row_lse, _, positives in found]).sum()
        own = batch  # columns whose loss counts
        if ranks is not None:
            own = columns.shape[1]
            col_lse, loss_sum = ranks.merge(col_lse, loss_sum)
        elif columns.shape[1] != batch:
            # Foreign columns are negatives only: without a loss of their own they have no term in the gradient.
            col_lse[:, :, :offset] = math.inf
            col_lse[:, :, offset + batch :] = math.inf
        loss_sum = loss_sum + (col_lse if own == columns.shape[1] else col_lse[:, :, offset : offset + own]).sum() / 2
        pairs = col_lse.shape[0] * col_lse.shape[1] * own
        ctx.save_for_backward(columns, scale_value, col_lse, *(row_lse for row_lse, _, _ in found), *rows)
        ctx.offset, ctx.pairs, ctx.ranks, ctx.backend = offset, pairs, ranks, backend
        ctx.dtypes = b_VBD.dtype, scale.dtype, parts[0].dtype
        return loss_sum / pairs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        columns, scale, col_lse, *rest = ctx.saved_tensors
        row_lses, rows = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        want_columns = ctx.needs_input_grad[0]
        col_lses = col_lse.split([part.shape[0] for part in rows])
        weight = grad_loss / (2 * ctx.pairs)
        grad_columns: Tensor | None = None
        grad_scale = torch.zeros_like(scale)
        grads: list[Tensor | None] = []
        for i, part in enumerate(rows):
            grad, part_columns = _feature_gradients(
                part, columns, scale, row_lses[i], col_lses[i], ctx.offset, want_columns, ctx.backend
            )
            # d loss / d scale = sum of (d loss / d s) s / scale = <d loss / d x, x> / scale: no pass over the logits.
            grad_scale = grad_scale + weight * _inner_product(grad, part)
            grads.append(grad.mul_(weight * scale).to(ctx.dtypes[2]))
            if want_columns:
                grad_columns = part_columns if grad_columns is None else grad_columns.add_(part_columns)
        if grad_columns is not None:
            grad_columns.mul_(weight * scale)
            if ctx.ranks is not None:
                grad_columns = ctx.ranks.scatter_columns(grad_columns)
            grad_columns = grad_columns.to(ctx.dtypes[0])
        return grad_columns, grad_scale.to(ctx.dtypes[1]), None, None, None, None, *grads


def _inner_product(grad_VBD: Tensor, features_VBD: Tensor) -> Tensor:
    """Sum of the products of all entries, view by view: the workspace is one view."""
    return torch.stack([torch.sum(grad * view) for grad, view in zip(grad_VBD, features_VBD, strict=True)]).sum()


def _rounded(features_VBD: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that `dtype` holds, in the dtype of the sums, with the gradient of the identity."""
    features_VBD = features_VBD.to(compute_dtype(features_VBD.dtype))
    return features_VBD.detach().to(dtype).to(features_VBD.dtype) + (features_VBD - features_VBD.detach())


def _run_eager(
    parts: list[Tensor], b_VBD: Tensor, scale: Tensor, offset: int, group: dist.ProcessGroup | None
) -> Tensor:
    if group is not None:
        raise ValueError(f"{OP}: the eager backend computes one process's batch; use another with a group")
    dtype = compute_dtype(b_VBD.dtype)
    a_VBD, b_VBD, scale = torch.cat(parts).to(dtype), b_VBD.to(dtype), scale.to(dtype)
    with torch.autocast(b_VBD.device.type, enabled=False):
        if a_VBD.shape[1] == b_VBD.shape[1]:
            return reference.multiview_infonce(a_VBD, b_VBD, scale)
        batch = a_VBD.shape[1]
        labels = torch.arange(batch, device=b_VBD.device)
        losses = [
            F.cross_entropy(scale * a_BD @ b_GD.T, labels + offset)
            + F.cross_entropy(scale * b_GD[offset : offset + batch] @ a_BD.T, labels)
            for a_BD in a_VBD
            for b_GD in b_VBD
        ]
        return torch.stack(losses).mean() / 2


def _why_not_triton(rows_VBD: Tensor, columns_VGD: Tensor) -> str | None:
    if rows_VBD.dtype not in TRITON_DTYPES:
        return f"features in {rows_VBD.dtype}, it takes float32, bfloat16 or float16"
    if rows_VBD.shape[2] > TRITON_MAX_DIM:
        return f"features of shape {tuple(rows_VBD.shape)}, it takes D up to {TRITON_MAX_DIM}"
    return triton_support.why_not_on(rows_VBD, columns_VGD)


def _why_not_cuda(rows_VBD: Tensor, columns_VGD: Tensor) -> str | None:
    return infonce_cuda.why_unsupported(rows_VBD, columns_VGD) or _why_not_triton(rows_VBD, columns_VGD)


register(
    Backend(
        OP,
        "triton",
        load=partial(import_module, "cosmos_kernels.infonce_triton"),
        summary="one product for both directions; gradients by the library's products from the L2 cache",
        why_unavailable=triton_support.why_missing_on_blackwell,
        why_unsupported=_why_not_triton,
    ),
    Backend(
        OP,
        "cuda",
        infonce_cuda,
        summary="Triton's forward, and a backward in CUDA C++ for fp16 and bf16 features",
        why_unavailable=lambda: native.why_no_gpu() or triton_support.why_missing_on_blackwell(),
        why_unsupported=_why_not_cuda,
    ),
    Backend(OP, "tiled", infonce_tiled, "PyTorch, tile by tile; no logits stored"),
    Backend(OP, "eager", _run_eager, "the oracle: every pair by itself", automatic=False),
)
