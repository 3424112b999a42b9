"""Attention over packed sequences by PyTorch's scaled_dot_product_attention, one call a group of equal lengths.

Runs everywhere, in any floating-point type.
Axes: T packed queries, S packed keys, N sequences of a group, L tokens of a sequence, H heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_fast.ops.attention_sequences import Groups, Sequences

# On two cores of an EPYC, forward and backward of plain products took 0.4 of scaled_dot_product_attention's time at 10
# and 12 tokens, as long as it at 25 to 30.
SHORT_TOKENS = 16


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
    if mask is None and 1 < queries <= keys <= SHORT_TOKENS and _is_plain(q_NHLd):
        return _attend_short(q_NHLd, k_NHLd, v_NHLd, square)
    out_NHLd = F.scaled_dot_product_attention(q_NHLd, k_NHLd, v_NHLd, attn_mask=mask, is_causal=square)
    return out_NHLd.transpose(1, 2).flatten(0, 1)


def _is_plain(x: Tensor) -> bool:
    """Where products lose no precision over the fused kernel, and launching three of them costs nothing."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def _attend_short(q_NHLd: Tensor, k_NHLd: Tensor, v_NHLd: Tensor, causal: bool) -> Tensor:
    """[N*L, H, d]: scores, softmax and mixing as batched products; keeps [N, H, L, L] weights for backward."""
    count, heads, queries, _ = q_NHLd.shape
    q, k, v = (x.flatten(0, 1) for x in (q_NHLd, k_NHLd, v_NHLd))
    hidden = q.new_full((queries, k.shape[1]), float("-inf")).triu_(1) if causal else q.new_zeros(())
    scores = torch.baddbmm(hidden, q, k.mT, alpha=q.shape[-1] ** -0.5)
    out_NHLd = torch.bmm(scores.softmax(dim=-1), v).unflatten(0, (count, heads))
    return out_NHLd.transpose(1, 2).flatten(0, 1).contiguous()  # of one sequence, flattening alone is a view


def _split(x_THd: Tensor, groups: Groups) -> list[Tensor]:
    """[N, H, L, d] of each group, without a copy."""
    pieces = x_THd.split([count * length for count, length in groups]) if len(groups) > 1 else [x_THd]
    return [
        piece.unflatten(0, (count, length)).transpose(1, 2)
        for piece, (count, length) in zip(pieces, groups, strict=True)
    ]
