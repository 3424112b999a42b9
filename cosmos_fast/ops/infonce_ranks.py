"""Collectives of multi-view InfoNCE: one gather of the columns, one merge of the log-sum-exps, one reduce-scatter.

Axes: Va, Vb views, B per-rank batch, G global batch, D embedding.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather_columns(own_VBD: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, int]:
    """All ranks' columns [Vb, G, D], and the column at which this rank's begin."""
    world, batch = dist.get_world_size(group), own_VBD.shape[1]
    own_VBD = own_VBD.contiguous()
    gathered = own_VBD.new_empty(world, *own_VBD.shape)
    dist.all_gather_into_tensor(gathered.view(world * own_VBD.shape[0], *own_VBD.shape[1:]), own_VBD, group=group)
    return gathered.transpose(0, 1).flatten(1, 2).contiguous(), dist.get_rank(group) * batch


def merge(col_lse: Tensor, row_part: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Column log-sum-exps over the rows of all ranks, and the sum of the scalar row_part over ranks."""
    peak = col_lse.clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    sums = torch.cat([(col_lse - peak).exp_().flatten(), row_part.view(1)])  # one collective for both
    dist.all_reduce(sums, group=group)
    return sums[:-1].view_as(peak).log().add_(peak), sums[-1]


def scatter_columns(grad_VGD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's columns of the gradient summed over ranks: [Vb, B, D]."""
    world = dist.get_world_size(group)
    by_rank = grad_VGD.unflatten(1, (world, -1)).transpose(0, 1).contiguous()
    own = torch.empty_like(by_rank[0])
    dist.reduce_scatter_tensor(own, by_rank.flatten(0, 1), group=group)
    return own
