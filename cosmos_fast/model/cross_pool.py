"""The cross-attention pooling as a module: parameters under the original's names, the arithmetic in `ops`."""

from __future__ import annotations

from torch import Tensor, nn

from cosmos_fast.model.attention import AttentionProjections
from cosmos_fast.ops import PoolWeights, attention_weights, cross_attention_pool


class CrossAttentionPool(nn.Module):
    """normalize(query + attention(LN(query), LN(tokens))), one query a view."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"embed_dim {dim} is not a multiple of the {heads} heads of the cross-attention pooling")
        self.heads = heads
        self.ln_q = nn.LayerNorm(dim)
        self.ln_k = nn.LayerNorm(dim)
        self.attn = AttentionProjections(dim)

    @property
    def weights(self) -> PoolWeights:
        return PoolWeights(
            ln_q_weight=self.ln_q.weight,
            ln_q_bias=self.ln_q.bias,
            ln_k_weight=self.ln_k.weight,
            ln_k_bias=self.ln_k.bias,
            in_proj_weight=self.attn.in_proj_weight,
            in_proj_bias=self.attn.in_proj_bias,
            out_proj_weight=self.attn.out_proj.weight,
            out_proj_bias=self.attn.out_proj.bias,
            heads=self.heads,
        )

    def forward(self, tokens_BLD: Tensor, queries_BVD: Tensor) -> Tensor:
        """Tokens [B, L, D], un-normalised features [B, V, D] -> cross-modal features [B, V, D], L2-normalised."""
        return cross_attention_pool(tokens_BLD, queries_BVD, self.weights)

    def attention(self, tokens_BLD: Tensor, queries_BVD: Tensor) -> Tensor:
        """Attention weights [B, V, H, L] over the tokens."""
        return attention_weights(tokens_BLD, queries_BVD, self.weights)
