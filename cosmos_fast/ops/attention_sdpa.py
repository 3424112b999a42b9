"""Attention over packed sequences by PyTorch's scaled_dot_product_attention, one call a group of equal lengths.

Runs everywhere, in any floating-point type.
Axes: T packed queries, S packed keys, N sequences of a group, L tokens of a sequence, H heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_fast.ops.attention_sequences import Groups, Sequences


def attend(q_THd: Tensor, k_SHd: Tensor, v_SHd: Tensor, sequences: Sequences, causal: bool) -> Tensor:
    """[T, H, d], under autograd."""
    outputs = [
        _attend_group(q_NHLd, k_NHLd, v_NHLd, visible_N, causal)
        for q_NHLd, k_NHLd, v_NHLd, visible_N in zip(
            _split(q_THd, sequences.query_groups),
            _split(k_SHd, sequences.key_groups),
            _split(v_SHd, sequences.key_groups),
            sequences.visible_keys,
            strict=True,
        )
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_group(q_NHLd: Tensor, k_NHLd: Tensor, v_NHLd: Tensor, visible_N: Tensor | None, causal: bool) -> Tensor:
    queries, keys = q_NHLd.shape[2], k_NHLd.shape[2]
    mask = None
    if visible_N is not None:
        assert queries == 1, "rounded sequences with several queries"
        mask = (torch.arange(keys, device=visible_N.device) < visible_N.unsqueeze(1))[:, None, None]
    elif causal and 1 < queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q_NHLd.device).tril_(keys - queries)
    square = causal and queries == keys
    out_NHLd = F.scaled_dot_product_attention(q_NHLd, k_NHLd, v_NHLd, attn_mask=mask, is_causal=square)
    return out_NHLd.transpose(1, 2).flatten(0, 1)


def _split(x_THd: Tensor, groups: Groups) -> list[Tensor]:
    """[N, H, L, d] of each group, without a copy."""
    pieces = x_THd.split([count * length for count, length in groups]) if len(groups) > 1 else [x_THd]
    return [
        piece.unflatten(0, (count, length)).transpose(1, 2)
        for piece, (count, length) in zip(pieces, groups, strict=True)
    ]
