"""Multi-head self-attention over packed sequences.

Parameters carry the names of `nn.MultiheadAttention` (`in_proj_weight`, `in_proj_bias`, `out_proj`), so that stock
checkpoints load. Axes: T packed tokens, N sequences of a group, L tokens, D width, H heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_fast.model.packing import PackedLayout, SequenceGroup


class AttentionProjections(nn.Module):
    """The parameters of an `nn.MultiheadAttention`, under its names and with its initialisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)


class PackedSelfAttention(AttentionProjections):
    """Self-attention on [T, D], sequence by sequence as a layout says.

    In three steps, so that what is around the attention can be compiled: `project`, `attend`, and `out_proj`; `_kept`
    stands for the rows that are read afterwards.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width)
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads

    def project(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, 3 D]: queries, keys and values."""
        return F.linear(x_TD, self.in_proj_weight, self.in_proj_bias)

    def project_kept(self, x_TD: Tensor, kept_rows_K: Tensor) -> tuple[Tensor, Tensor]:
        """[T, D] -> queries [K, D] of the rows that are read, keys and values [T, 2 D] of every token."""
        width = x_TD.shape[1]
        weight_q, weight_kv = self.in_proj_weight.split([width, 2 * width])
        bias_q, bias_kv = self.in_proj_bias.split([width, 2 * width])
        q_KD = F.linear(x_TD.index_select(0, kept_rows_K), weight_q, bias_q)
        return q_KD, F.linear(x_TD, weight_kv, bias_kv)

    def attend(self, qkv_T3D: Tensor, layout: PackedLayout) -> Tensor:
        """[T, 3 D] -> [T, D], every token attending within its sequence."""
        parts = zip(qkv_T3D.split(layout.token_counts), layout.groups, strict=True)
        return torch.cat([_attend_all(qkv, group, self.heads, layout.causal) for qkv, group in parts])

    def attend_kept(self, q_KD: Tensor, kv_T2D: Tensor, layout: PackedLayout) -> Tensor:
        """[K, D], [T, 2 D] -> [K, D]: the rows that are read, attending to every token of their sequence."""
        parts = zip(q_KD.split(layout.kept_counts), kv_T2D.split(layout.token_counts), layout.groups, strict=True)
        return torch.cat([_attend_kept(q, kv, group, self.heads, layout.causal) for q, kv, group in parts])

    def attend_csa(self, qkv_T3D: Tensor, layout: PackedLayout) -> Tensor:
        """Correlative self-attention for dense features: weights softmax(q q^T) + softmax(k k^T), full attention."""
        outputs = []
        for qkv, group in zip(qkv_T3D.split(layout.token_counts), layout.groups, strict=True):
            q, k, v = _split_heads(qkv, group, self.heads, parts=3)
            scaling = q.shape[-1] ** -0.5
            weights = (q @ q.mT * scaling).softmax(-1) + (k @ k.mT * scaling).softmax(-1)
            outputs.append(_merge_heads(weights @ v))
        return torch.cat(outputs)


def _attend_all(qkv: Tensor, group: SequenceGroup, heads: int, causal: bool) -> Tensor:
    q, k, v = _split_heads(qkv, group, heads, parts=3)
    return _merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=causal))


def _attend_kept(q: Tensor, kv: Tensor, group: SequenceGroup, heads: int, causal: bool) -> Tensor:
    k, v = _split_heads(kv, group, heads, parts=2)
    if group.keep_all:
        (q,) = _split_heads(q, group, heads, parts=1)
        return _merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    q_NH1d = q.view(group.count, 1, heads, -1).transpose(1, 2)
    mask = _visible_from_pooled(group, q.device) if causal else None
    return _merge_heads(F.scaled_dot_product_attention(q_NH1d, k, v, attn_mask=mask))


def _visible_from_pooled(group: SequenceGroup, device: torch.device) -> Tensor | None:
    """Boolean mask [N, 1, 1, L] of the keys that each pooled token may see; None when it sees them all."""
    if all(position == group.length - 1 for position in group.pooled):
        return None
    last_visible = torch.tensor(group.pooled, device=device).view(-1, 1, 1, 1)
    return torch.arange(group.length, device=device) <= last_visible


def _split_heads(packed: Tensor, group: SequenceGroup, heads: int, parts: int) -> tuple[Tensor, ...]:
    """[N*L, parts*D] -> `parts` tensors [N, H, L, d]."""
    return packed.view(group.count, group.length, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _merge_heads(x_NHLd: Tensor) -> Tensor:
    """[N, H, L, d] -> [N*L, D]."""
    return x_NHLd.transpose(1, 2).flatten(2).flatten(0, 1)
