"""Pre-LayerNorm transformer blocks over packed sequences; the last block only makes the rows that are read."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_fast.model.attention import PackedSelfAttention
from cosmos_fast.model.packing import PackedLayout


class Mlp(nn.Module):
    """Linear, exact GELU, linear; hidden width four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x_TD)))


class ResidualBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = PackedSelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        x_TD = x_TD + self.attn(self.ln_1(x_TD), layout)
        return x_TD + self.mlp(self.ln_2(x_TD))

    def forward_kept(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        """The same on the rows that are read afterwards: [T, D] -> [kept rows, D]."""
        kept_KD = x_TD.index_select(0, layout.kept_rows) + self.attn.forward_kept(self.ln_1(x_TD), layout)
        return kept_KD + self.mlp(self.ln_2(kept_KD))

    def forward_csa(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        """The same with correlative self-attention."""
        x_TD = x_TD + self.attn.forward_csa(self.ln_1(x_TD), layout)
        return x_TD + self.mlp(self.ln_2(x_TD))


class Transformer(nn.Module):
    """A stack of residual blocks."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads) for _ in range(layers))

    @property
    def blocks(self) -> list[ResidualBlock]:
        return cast("list[ResidualBlock]", list(self.resblocks))

    def forward(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        """[T, D] -> [kept rows, D] of the layout."""
        *blocks, last = self.blocks
        for block in blocks:
            x_TD = block(x_TD, layout)
        return last.forward_kept(x_TD, layout)

    def forward_csa(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        """[T, D] -> [T, D], correlative self-attention in the last block."""
        *blocks, last = self.blocks
        for block in blocks:
            x_TD = block(x_TD, layout)
        return last.forward_csa(x_TD, layout)
