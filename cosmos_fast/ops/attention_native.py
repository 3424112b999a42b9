"""Attention over packed sequences by this project's C++ kernels, on the CPU in fp32.

Whole heads in the cache and fused, where scaled_dot_product_attention works a group of equal lengths at a time; for the
backward pass it keeps one number a row beside queries, keys and values.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from cosmos_fast.ops.attention_sequences import Sequences
from cosmos_fast.ops.first_order import first_order
from cosmos_kernels import attention_native


def attend(q_THd: Tensor, k_SHd: Tensor, v_SHd: Tensor, sequences: Sequences, causal: bool) -> Tensor:
    """[T, H, d], under autograd."""
    out_THd: Tensor = _Attention.apply(q_THd, k_SHd, v_SHd, sequences, causal)
    return out_THd


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, causal: bool) -> Tensor:
        out, lse = attention_native.forward(q, k, v, sequences.cu_queries, sequences.cu_keys, causal)
        ctx.sequences, ctx.causal = sequences, causal
        ctx.save_for_backward(q, k, v, lse)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lse = ctx.saved_tensors
        cu_queries, cu_keys = ctx.sequences.cu_queries, ctx.sequences.cu_keys
        grads = attention_native.backward(grad_out, q, k, v, lse, cu_queries, cu_keys, ctx.causal)
        return *grads, None, None
