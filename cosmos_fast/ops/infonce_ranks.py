"""Collectives of multi-view InfoNCE: one gather of the columns, one merge of the log-sum-exps, one reduce-scatter.

Axes: Va, Vb views, B per-rank batch, G global batch, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_fast.utils.phases import PhaseClock, no_clock


@dataclass(frozen=True)
class Ranks:
    """The processes that share the global batch.

    clock: told of every collective, which lasts until the slowest rank has come to it.
    """

    group: dist.ProcessGroup
    clock: PhaseClock = no_clock

    def gather_columns(self, own_VBD: Tensor) -> tuple[Tensor, int]:
        """All ranks' columns [Vb, G, D], and the column at which this rank's begin."""
        world, batch = dist.get_world_size(self.group), own_VBD.shape[1]
        own_VBD = own_VBD.contiguous()
        gathered = own_VBD.new_empty(world, *own_VBD.shape)
        flat = gathered.view(world * own_VBD.shape[0], *own_VBD.shape[1:])
        with self.clock("communication"):
            dist.all_gather_into_tensor(flat, own_VBD, group=self.group)
        return gathered.transpose(0, 1).flatten(1, 2).contiguous(), dist.get_rank(self.group) * batch

    def merge(self, col_lse: Tensor, row_part: Tensor) -> tuple[Tensor, Tensor]:
        """Column log-sum-exps over the rows of all ranks, and the sum of the scalar row_part over ranks."""
        peak = col_lse.clone()
        with self.clock("communication"):
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=self.group)
        sums = torch.cat([(col_lse - peak).exp_().flatten(), row_part.view(1)])  # one collective for both
        with self.clock("communication"):
            dist.all_reduce(sums, group=self.group)
        return sums[:-1].view_as(peak).log().add_(peak), sums[-1]

    def scatter_columns(self, grad_VGD: Tensor) -> Tensor:
        """This rank's columns of the gradient summed over ranks: [Vb, B, D]."""
        by_rank = grad_VGD.unflatten(1, (dist.get_world_size(self.group), -1)).transpose(0, 1).contiguous()
        own = torch.empty_like(by_rank[0])
        with self.clock("communication"):
            dist.reduce_scatter_tensor(own, by_rank.flatten(0, 1), group=self.group)
        return own
