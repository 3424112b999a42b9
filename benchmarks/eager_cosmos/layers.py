"""Transformer blocks and the pooling of the eager port.

Axes: B batch (here: sequences of all views), V views, L tokens, D width, H heads. Blocks run in the L, B, D order.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """One pre-norm residual block: x + attention(ln_1(x)), then x + mlp(ln_2(x)), with the exact GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x_LBD: Tensor, mask_LL: Tensor | None = None) -> Tensor:
        """`x_LBD` and the result are float [L, B, D]; `mask_LL` is added to the scores."""
        y_LBD = self.ln_1(x_LBD)
        x_LBD = x_LBD + self.attn(y_LBD, y_LBD, y_LBD, need_weights=False, attn_mask=mask_LL)[0]
        return x_LBD + self.mlp(self.ln_2(x_LBD))

    def forward_csa(self, x_LBD: Tensor) -> Tensor:
        """The block with correlative self-attention: weights softmax(q qᵀ) + softmax(k kᵀ), for segmentation only."""
        tokens, batch, width = x_LBD.shape
        heads = self.attn.num_heads
        packed = F.linear(self.ln_1(x_LBD), self.attn.in_proj_weight, self.attn.in_proj_bias)
        q, k, v = (part.reshape(tokens, batch * heads, -1).transpose(0, 1) for part in packed.chunk(3, dim=-1))
        scale = q.shape[-1] ** -0.5
        weights = (scale * q @ q.mT).softmax(-1) + (scale * k @ k.mT).softmax(-1)
        mixed_LBD = (weights @ v).transpose(0, 1).reshape(tokens, batch, width)
        x_LBD = x_LBD + self.attn.out_proj(mixed_LBD)
        return x_LBD + self.mlp(self.ln_2(x_LBD))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x_BLD: Tensor, mask_LL: Tensor | None = None, csa: bool = False) -> Tensor:
        """Float [B, L, D] -> [B, L, D]; `csa` changes the attention of the last block."""
        x_LBD = x_BLD.permute(1, 0, 2)
        last = len(self.resblocks) - 1
        for number, block in enumerate(self.resblocks):
            assert isinstance(block, Block)
            x_LBD = block.forward_csa(x_LBD) if csa and number == last else block(x_LBD, mask_LL)
        return x_LBD.permute(1, 0, 2)


class CrossAttentionPool(nn.Module):
    """One query per view attends to the tokens of the other modality."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_q = nn.LayerNorm(width)
        self.ln_k = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, queries_BD: Tensor, tokens_BLD: Tensor) -> Tensor:
        """Queries [V*B, D] view-major and tokens [B, L, D] -> [V*B, D]. The tokens are repeated once per view."""
        views = queries_BD.shape[0] // tokens_BLD.shape[0]
        keys_BLD = self.ln_k(tokens_BLD.repeat(views, 1, 1))
        queries_B1D = self.ln_q(queries_BD).unsqueeze(1)
        return self.attn(queries_B1D, keys_BLD, keys_BLD, need_weights=False)[0].squeeze(1)


def causal_mask(length: int) -> Tensor:
    """The float mask [L, L] of the text tower: -inf above the diagonal, 0 elsewhere."""
    return torch.full((length, length), float("-inf")).triu(1)
