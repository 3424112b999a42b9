"""Multi-view InfoNCE in one pass: every pair of views, both directions, no stored logits.

For rows x (view a, sample i) and columns y (view b, sample j), s = scale <x, y>; the positive of row i is column
offset + i:

    loss = mean over (a, b, i) of  1/2 (logsumexp_j s_ij + logsumexp_i' s_i',offset+i) - s_i,offset+i
    dL/ds = (exp(s - row_lse) + exp(s - col_lse) - 2 [j = offset + i]) / (2 pairs of rows)

Forward keeps the two log-sum-exps only; backward recomputes the logits. Across ranks the columns are gathered once,
column log-sum-exps are merged, and the columns' gradient goes back by one reduce-scatter; see ops.infonce_terms.

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

from collections.abc import Sequence
from functools import partial
from importlib import import_module

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cosmos_fast.ops import infonce_tiled
from cosmos_fast.ops.backends import Backend, register
from cosmos_fast.ops.infonce_autograd import InfoNCE, term_statistics
from cosmos_fast.ops.infonce_checks import OP, check_arguments
from cosmos_fast.ops.infonce_ranks import Columns, ReturningColumns, Scattered, merge
from cosmos_fast.ops.infonce_tiled import compute_dtype
from cosmos_fast.utils.collectives import Collectives
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
    if group is not None:
        collectives = Collectives(group, clock)
        return infonce_terms([(parts, b_VBD, scale)], collectives, operand_dtype=operand_dtype, backend=backend)[0]
    if backend == "eager":
        if operand_dtype is not None:
            parts, b_VBD = [_rounded(part, operand_dtype) for part in parts], _rounded(b_VBD, operand_dtype)
        return _run_eager(parts, b_VBD, scale, offset)
    if b_VBD.shape[1] == parts[0].shape[1] and _rather_columns(parts, b_VBD):
        parts, b_VBD = [b_VBD], parts[0] if len(parts) == 1 else torch.cat(parts)
    dtype = parts[0].dtype if operand_dtype is None else operand_dtype
    return InfoNCE.apply(b_VBD, scale, offset, None, dtype, backend, *parts)


def infonce_terms(
    terms: Sequence[tuple[Tensor | Sequence[Tensor], Tensor | Columns, Tensor]],
    collectives: Collectives,
    *,
    operand_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """`multiview_infonce` of several terms (a_VBD, b_VBD, scale) with a group; their log-sum-exps are merged together.

    The b of a term may be on its way to all ranks already, as Columns: it gets no gradient. Terms are worked off in
    order, forward, and from the last to the first backward: the columns that have to wait for others, or whose gradient
    others wait for, best come last.
    """
    if backend == "eager":
        raise ValueError(f"{OP}: the eager backend computes one process's batch; use another with a group")
    ready, found = [], []
    for a_VBD, b, scale in terms:
        parts = [a_VBD] if isinstance(a_VBD, Tensor) else list(a_VBD)
        own_VBD = b.own_VBD.detach() if isinstance(b, Columns) else b
        check_arguments(parts, own_VBD, scale, 0, operand_dtype, collectives.group)
        if not isinstance(b, Columns) and _rather_columns(parts, own_VBD):
            parts, own_VBD = [own_VBD], parts[0] if len(parts) == 1 else torch.cat(parts)
        dtype = parts[0].dtype if operand_dtype is None else operand_dtype
        columns = b if isinstance(b, Columns) else Columns(own_VBD, collectives, dtype)
        ready.append((parts, own_VBD, columns, scale, dtype))
    for parts, _, columns, scale, dtype in ready:
        found.append(term_statistics(parts, columns.wait().to(dtype), scale, columns.offset, dtype, backend))
    col_lses, loss_sums = merge([term.col_lse for term in found], [term.loss_sum for term in found], collectives)
    returning = [
        _returning(own_VBD, collectives, dtype) if own_VBD.requires_grad else (own_VBD, None)
        for _, own_VBD, _, _, dtype in ready
    ]
    losses = []
    for i, (parts, _, _, scale, dtype) in enumerate(ready):
        own_VBD, scattered = returning[i]
        term = found[i]._replace(col_lse=col_lses[i], loss_sum=loss_sums[i], scattered=scattered)
        losses.append(InfoNCE.apply(own_VBD, scale, term.offset, term, dtype, backend, *parts))
    return losses


def _returning(own_VBD: Tensor, collectives: Collectives, dtype: torch.dtype) -> tuple[Tensor, Scattered]:
    scattered = Scattered(collectives)
    return ReturningColumns.apply(own_VBD, compute_dtype(dtype), scattered), scattered


def _rather_columns(parts: list[Tensor], b_VBD: Tensor) -> bool:
    """Whether `a` should be the columns: the side without gradient is, else the one with fewer views.

    The loss is symmetric. Columns are what ranks exchange, and a gradient of theirs costs a product of its own.
    """
    wanted = any(part.requires_grad for part in parts)
    if wanted != b_VBD.requires_grad:
        return b_VBD.requires_grad
    return sum(part.shape[0] for part in parts) < b_VBD.shape[0]


def _rounded(features_VBD: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that `dtype` holds, in the dtype of the sums, with the gradient of the identity."""
    features_VBD = features_VBD.to(compute_dtype(features_VBD.dtype))
    return features_VBD.detach().to(dtype).to(features_VBD.dtype) + (features_VBD - features_VBD.detach())


def _run_eager(parts: list[Tensor], b_VBD: Tensor, scale: Tensor, offset: int) -> Tensor:
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
