"""Attention over packed sequences by this project's Triton kernels, for short sequences."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cosmos_fast.ops.attention_sequences import Sequences
from cosmos_fast.ops.first_order import first_order
from cosmos_kernels import attention_parts

_runs: WeakKeyDictionary[Sequences, list[attention_parts.Run]] = WeakKeyDictionary()


def attend(q_THd: Tensor, k_SHd: Tensor, v_SHd: Tensor, sequences: Sequences, causal: bool) -> Tensor:
    """[T, H, d], under autograd."""
    return _Attention.apply(q_THd, k_SHd, v_SHd, sequences, causal)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, causal: bool) -> Tensor:
        out, lse = _kernels().forward(q, k, v, *_lengths(sequences), causal, runs=launches(sequences))
        ctx.sequences, ctx.causal = sequences, causal
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        runs = launches(ctx.sequences)
        grads = _kernels().backward(grad_out, *ctx.saved_tensors, *_lengths(ctx.sequences), ctx.causal, runs=runs)
        return *grads, None, None


def launches(sequences: Sequences) -> list[attention_parts.Run]:
    """Which sequences share a launch; found once for all blocks of a tower."""
    runs = _runs.get(sequences)
    if runs is None:
        runs = _runs[sequences] = attention_parts.runs(sequences.query_groups, sequences.key_groups)
    return runs


def _lengths(sequences: Sequences) -> tuple[Tensor, Tensor, int, int]:
    return sequences.cu_queries, sequences.cu_keys, sequences.max_queries, sequences.max_keys


@cache
def _kernels() -> Any:
    return import_module("cosmos_kernels.attention_triton")
