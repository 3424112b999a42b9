"""The towers without pruning: what the pruned ones are held against."""

from __future__ import annotations

from torch import Tensor

from cosmos_fast.model.packing import PackedLayout
from cosmos_fast.model.transformer import Transformer


def run_every_block_on_every_token(self: Transformer, x_TD: Tensor, layout: PackedLayout) -> Tensor:
    """To stand in for Transformer.forward: the rows that are read are chosen after the last block."""
    for block in self.blocks:
        x_TD = block(x_TD, layout)
    return x_TD.index_select(0, layout.kept_rows)
