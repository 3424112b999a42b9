"""Attention over packed sequences by xformers: memory-efficient attention under a block-diagonal mask.

The home of the package: nothing else imports it. Not yet run on hardware.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cosmos_fast.ops.attention_limits import HALF_DTYPES, why_no_gpu, why_not_fused
from cosmos_fast.ops.attention_sequences import Sequences, lengths
from cosmos_fast.utils.capabilities import why_unusable

# One mask for all blocks of a tower.
_masks: WeakKeyDictionary[Sequences, dict[bool, Any]] = WeakKeyDictionary()


@cache
def why_unavailable() -> str | None:
    """None where the package is installed and the machine has a GPU."""
    return why_no_gpu((7, 0)) or why_unusable("xformers")


def why_unsupported(q_THd: Tensor, *_: Tensor) -> str | None:
    """None where its kernels take these tensors; they know fp32 too."""
    return why_not_fused(q_THd, (*HALF_DTYPES, torch.float32))


def attend(q_THd: Tensor, k_SHd: Tensor, v_SHd: Tensor, sequences: Sequences, causal: bool) -> Tensor:
    """[T, H, d], under autograd."""
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found,unused-ignore]

    by_kind = _masks.setdefault(sequences, {})
    mask = by_kind.get(causal)
    if mask is None:
        mask = by_kind[causal] = block_diagonal_mask(sequences, causal)
    packed = (x.unsqueeze(0) for x in (q_THd, k_SHd, v_SHd))
    return memory_efficient_attention(*packed, attn_bias=mask).squeeze(0)


def block_diagonal_mask(sequences: Sequences, causal: bool) -> Any:
    """xformers' description of the sequences, with our boundaries on the device, so that none are copied there."""
    from xformers.ops.fmha import attn_bias  # type: ignore[import-not-found,unused-ignore]

    if not causal:
        kind = attn_bias.BlockDiagonalMask
    elif sequences.query_groups == sequences.key_groups:
        kind = attn_bias.BlockDiagonalCausalMask
    else:
        kind = attn_bias.BlockDiagonalCausalFromBottomRightMask
    both = lengths(sequences.query_groups), lengths(sequences.key_groups)
    takes_device = "device" in inspect.signature(kind.from_seqlens).parameters
    mask = kind.from_seqlens(*both, **({"device": torch.device("cpu")} if takes_device else {}))
    queries = replace(mask.q_seqinfo, seqstart=sequences.cu_queries)
    same = mask.k_seqinfo is mask.q_seqinfo
    keys = queries if same else replace(mask.k_seqinfo, seqstart=sequences.cu_keys)
    return replace(mask, q_seqinfo=queries, k_seqinfo=keys)
