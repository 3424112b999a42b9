"""The two encoders as plain padded networks of standard operations, for programs that take a fixed graph.

Training packs captions by where they end, which a graph of fixed shapes cannot; the features are the same.
Axes: B batch, L context, W width, D embedding, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_fast.model.cosmos import CosmosModel
from cosmos_fast.model.transformer import Transformer


class ImageEncoder(nn.Module):
    """Images [B, 3, S, S] of the size of training, fp32 -> features [B, D], L2-normalised."""

    def __init__(self, model: CosmosModel) -> None:
        super().__init__()
        self.tower = model.visual

    def forward(self, images: Tensor) -> Tensor:
        tower = self.tower
        patches_BLW = tower.conv1(images).flatten(2).transpose(1, 2)
        class_B1W = tower.class_embedding.expand(images.shape[0], 1, -1)
        x_BLW = torch.cat([class_B1W, patches_BLW], dim=1) + tower.positional_embedding
        x_BLW = _blocks(tower.transformer, tower.ln_pre(x_BLW), causal=False)
        return F.normalize(tower.ln_post(x_BLW[:, 0]) @ tower.proj, dim=-1)


class TextEncoder(nn.Module):
    """Captions [B, L] of token ids, int64, padded to the whole context -> features [B, D], L2-normalised."""

    def __init__(self, model: CosmosModel) -> None:
        super().__init__()
        self.token_embedding, self.positional_embedding = model.token_embedding, model.positional_embedding
        self.transformer, self.ln_final = model.transformer, model.ln_final
        self.text_projection = model.text_projection

    def forward(self, tokens: Tensor) -> Tensor:
        x_BLW = self.token_embedding(tokens) + self.positional_embedding
        x_BLW = _blocks(self.transformer, x_BLW, causal=True)
        end_B11 = tokens.argmax(dim=-1).view(-1, 1, 1)  # the end token has the largest id
        end_BW = x_BLW.gather(1, end_B11.expand(-1, 1, x_BLW.shape[2])).squeeze(1)
        return F.normalize(self.ln_final(end_BW) @ self.text_projection, dim=-1)


def _blocks(transformer: Transformer, x_BLW: Tensor, causal: bool) -> Tensor:
    heads, head_width = transformer.heads, transformer.head_width
    for block in transformer.blocks:
        qkv_BL3W = F.linear(block.ln_1(x_BLW), block.attn.in_proj_weight, block.attn.in_proj_bias)
        q, k, v = (part.unflatten(2, (heads, head_width)).transpose(1, 2) for part in qkv_BL3W.chunk(3, dim=2))
        mixed_BHLd = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x_BLW = x_BLW + block.attn.out_proj(mixed_BHLd.transpose(1, 2).flatten(2))
        x_BLW = x_BLW + block.mlp(block.ln_2(x_BLW))
    return x_BLW
