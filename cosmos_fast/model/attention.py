"""The projections around multi-head self-attention over packed sequences.

Parameters carry the names of `nn.MultiheadAttention` (`in_proj_weight`, `in_proj_bias`, `out_proj`), so that stock
checkpoints load. The attention itself is `ops.attention.packed_attention`.
Axes: T packed tokens, K kept rows, N sequences of a group, L tokens, D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_fast.model.packing import PackedLayout
from cosmos_fast.ops.attention import Sequences, packed_attention
from cosmos_fast.ops.head_views import head_views


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

    in_proj_product: tuple[Callable[[Tensor], Tensor], ...] = ()  # of project(), where something else makes it (fp8)

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width)
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads

    def project(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, 3 D]: queries, keys and values."""
        if self.in_proj_product:
            return self.in_proj_product[0](x_TD)
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
        q_THd, k_THd, v_THd = self._split_heads(qkv_T3D, parts=3)
        return _attend(q_THd, k_THd, v_THd, layout.sequences, layout)

    def attend_kept(self, q_KD: Tensor, kv_T2D: Tensor, layout: PackedLayout) -> Tensor:
        """[K, D], [T, 2 D] -> [K, D]: the rows that are read, attending to every token of their sequence."""
        (q_KHd,) = self._split_heads(q_KD, parts=1)
        k_THd, v_THd = self._split_heads(kv_T2D, parts=2)
        return _attend(q_KHd, k_THd, v_THd, layout.kept_sequences, layout)

    def attend_csa(self, qkv_T3D: Tensor, layout: PackedLayout) -> Tensor:
        """Correlative self-attention for dense features: weights softmax(q q^T) + softmax(k k^T), full attention."""
        outputs = []
        for qkv, group in zip(qkv_T3D.split(layout.token_counts), layout.groups, strict=True):
            by_sequence = (part.unflatten(0, (group.count, group.length)) for part in self._split_heads(qkv, parts=3))
            q, k, v = (part.transpose(1, 2) for part in by_sequence)
            scaling = q.shape[-1] ** -0.5
            weights = (q @ q.mT * scaling).softmax(-1) + (k @ k.mT * scaling).softmax(-1)
            outputs.append((weights @ v).transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(outputs)

    def _split_heads(self, packed: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[T, parts * D] -> `parts` views [T, H, d]."""
        return head_views(packed, parts, self.heads)


def _attend(q_KHd: Tensor, k_THd: Tensor, v_THd: Tensor, sequences: Sequences, layout: PackedLayout) -> Tensor:
    out_KHd = packed_attention(q_KHd, k_THd, v_THd, sequences, causal=layout.causal, backend=layout.backend)
    return out_KHd.flatten(1)
