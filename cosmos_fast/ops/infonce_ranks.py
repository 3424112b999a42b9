"""What ranks tell each other in multi-view InfoNCE: columns gathered once, log-sum-exps merged once for all terms, and
one reduce-scatter of the columns' gradient.

Axes: Va, Vb views, B per-rank batch, G global batch, D embedding, W ranks, T terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cosmos_fast.ops.first_order import first_order
from cosmos_fast.ops.packed_rows import pack_rows, unpack_rows
from cosmos_fast.utils.collectives import Collectives, Pending


class Columns:
    """Columns [Vb, B, D] of every rank on their way to all, where they arrive in `dtype`; fp32 travels in 24 bits."""

    def __init__(self, own_VBD: Tensor, collectives: Collectives, dtype: torch.dtype) -> None:
        self.own_VBD = own_VBD
        self.offset = collectives.rank * own_VBD.shape[1]
        self._packed = dtype == torch.float32
        own_VBD = own_VBD.detach().to(dtype)
        self._gathered = collectives.all_gather(pack_rows(own_VBD) if self._packed else own_VBD, "gather of columns")

    def wait(self) -> Tensor:
        """All ranks' columns [Vb, G, D]; this rank's begin at column `offset`."""
        columns_VGD = self._gathered.wait().transpose(0, 1).flatten(1, 2)
        return unpack_rows(columns_VGD) if self._packed else columns_VGD.contiguous()


class ReturningColumns(torch.autograd.Function):
    """The identity on this rank's columns, whose gradient waits for the reduce-scatter that brings it.

    It stands apart from the node that starts the reduce-scatter, so that other gradients are computed in between.
    """

    @staticmethod
    def forward(ctx: Any, own_VBD: Tensor, dtype: torch.dtype, scattered: Scattered) -> Tensor:
        ctx.scattered, ctx.dtype = scattered, own_VBD.dtype
        ctx.save_for_backward(own_VBD)  # for `first_order` alone
        return own_VBD.detach().to(dtype, copy=True)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_VBD: Tensor) -> tuple[Tensor, None, None]:
        return ctx.scattered.finish(grad_VBD).to(ctx.dtype), None, None


class Scattered:
    """The way of the columns' gradient back to their ranks."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._pending: Pending | None = None

    def begin(self, grad_VGD: Tensor) -> Tensor:
        """Start to sum over ranks; returns this rank's [Vb, B, D], which is there after finish() only."""
        by_rank = grad_VGD.unflatten(1, (self._collectives.world_size, -1)).transpose(0, 1)
        self._pending = self._collectives.reduce_scatter(by_rank, "reduce-scatter of gradients")
        return self._pending.unfinished

    def finish(self, grad_VBD: Tensor) -> Tensor:
        """The sum, once it is there."""
        assert self._pending is not None
        assert grad_VBD.data_ptr() == self._pending.unfinished.data_ptr(), "the columns have another use"
        return self._pending.wait()


def merge(
    col_lses: Sequence[Tensor], row_parts: Sequence[Tensor], collectives: Collectives
) -> tuple[list[Tensor], list[Tensor]]:
    """Column log-sum-exps over the rows of all ranks, and sums over ranks; for all terms together.

    An all-reduce whose sum is a log-sum-exp, in its two halves: each rank merges its own columns, then tells all. In
    the logarithm nothing overflows, however large the logits, and every rank gets the same bits.

    Args:
        col_lses: [Va, Vb, G] of each term, over this rank's rows.
        row_parts: 0-dim, one a term, same dtype.

    Returns:
        The same shapes.
    """
    world, shapes = collectives.world_size, [lse.shape for lse in col_lses]
    by_rank = [lse.unflatten(2, (world, -1)).movedim(2, 0).flatten(1) for lse in col_lses]
    sizes = [part.shape[1] for part in by_rank]
    sums = torch.stack(list(row_parts)).expand(world, -1)
    told = collectives.exchange(torch.cat([*by_rank, sums], dim=1), "exchange of log-sum-exps")
    lses, sums = told.split([sum(sizes), len(row_parts)], dim=1)
    merged = collectives.all_gather(lses.logsumexp(dim=0), "gather of log-sum-exps").wait()
    whole = [
        part.unflatten(1, (*shape[:2], -1)).movedim(0, 2).flatten(2)
        for part, shape in zip(merged.split(sizes, dim=1), shapes, strict=True)
    ]
    return whole, list(sums.sum(dim=0))
