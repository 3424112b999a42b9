"""Attention over packed sequences by `torch.nn.attention.varlen`: the FlashAttention-2 kernels that PyTorch brings.

Since PyTorch 2.10, whose function says `is_causal` where later ones have a window of keys. Not yet run on hardware.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from cosmos_fast.ops.attention_limits import why_no_gpu
from cosmos_fast.ops.attention_sequences import Sequences

MODULE = "torch.nn.attention.varlen"


@cache
def why_unavailable() -> str | None:
    """None where PyTorch has the function and the machine a GPU for it."""
    if find_spec(MODULE) is None:
        return f"PyTorch {torch.__version__} has no {MODULE}: it came with 2.10"
    return why_no_gpu((8, 0))


def attend(q_THd: Tensor, k_SHd: Tensor, v_SHd: Tensor, sequences: Sequences, causal: bool) -> Tensor:
    """[T, H, d], under autograd."""
    lengths = sequences.cu_queries, sequences.cu_keys, sequences.max_queries, sequences.max_keys
    function, causal_option = varlen_function()
    return function(q_THd, k_SHd, v_SHd, *lengths, **(causal_option if causal else {}))


@cache
def varlen_function() -> tuple[Callable[..., Any], dict[str, Any]]:
    """PyTorch's function, and the option that makes it causal."""
    from torch.nn.attention.varlen import varlen_attn

    windowed = "window_size" in inspect.signature(varlen_attn).parameters
    return varlen_attn, {"window_size": (-1, 0)} if windowed else {"is_causal": True}
