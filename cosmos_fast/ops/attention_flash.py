"""Attention over packed sequences by the flash-attn packages: version 3 on Hopper where installed, else version 2.

The home of both packages: nothing else imports them. Not yet run on hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cosmos_fast.ops.attention_limits import why_no_gpu
from cosmos_fast.ops.attention_sequences import Sequences
from cosmos_fast.utils.capabilities import why_unusable

HOPPER = 9  # major compute capability


@cache
def why_unavailable() -> str | None:
    """None where a version of flash-attn is installed that the GPU can run."""
    no_gpu = why_no_gpu((8, 0))
    if no_gpu is not None or has_version_3():
        return no_gpu
    return why_unusable("flash_attn")


def attend(q_THd: Tensor, k_SHd: Tensor, v_SHd: Tensor, sequences: Sequences, causal: bool) -> Tensor:
    """[T, H, d], under autograd."""
    out_THd = flash_function()(
        q_THd,
        k_SHd,
        v_SHd,
        cu_seqlens_q=sequences.cu_queries,
        cu_seqlens_k=sequences.cu_keys,
        max_seqlen_q=sequences.max_queries,
        max_seqlen_k=sequences.max_keys,
        causal=causal,
    )
    return out_THd[0] if isinstance(out_THd, tuple) else out_THd  # early versions 3 add the log-sum-exps


@cache
def flash_function() -> Callable[..., Any]:
    """`flash_attn_varlen_func` of the version that runs here."""
    if has_version_3():
        from flash_attn_interface import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]
    else:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]
    return flash_attn_varlen_func


def has_version_3() -> bool:
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == HOPPER
    return hopper and why_unusable("flash_attn_3") is None
