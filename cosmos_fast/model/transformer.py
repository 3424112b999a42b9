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
        return self._finish(x_TD, self.attn.attend(self._project(x_TD), layout))

    def forward_kept(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        """The same on the rows that are read afterwards: [T, D] -> [kept rows, D]."""
        q_KD, kv_T2D = self._project_kept(x_TD, layout.kept_rows)
        return self._finish(x_TD.index_select(0, layout.kept_rows), self.attn.attend_kept(q_KD, kv_T2D, layout))

    def forward_csa(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        """The same with correlative self-attention."""
        return self._finish(x_TD, self.attn.attend_csa(self._project(x_TD), layout))

    def _project(self, x_TD: Tensor) -> Tensor:
        return self.attn.project(self.ln_1(x_TD))

    def _project_kept(self, x_TD: Tensor, kept_rows_K: Tensor) -> tuple[Tensor, Tensor]:
        return self.attn.project_kept(self.ln_1(x_TD), kept_rows_K)

    def _finish(self, x_TD: Tensor, mixed_TD: Tensor) -> Tensor:
        """What follows the attention, whose outputs are `mixed_TD`."""
        x_TD = x_TD + self.attn.out_proj(mixed_TD)
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
