"""Launchers of the attention of csrc/attention_cpu.cpp: fp32 on the CPU, packed sequences of any lengths.

Axes: N sequences, T packed queries, S packed keys, H heads, d head width.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import native

LANES = 8  # kLanes of csrc/small_products.h
LONGEST = 512  # the scores of a head stay in the cache


class _Attention(ctypes.Structure):
    """CosmosAttention."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64) for name in ("q_row", "k_row", "v_row")),
        *((name, ctypes.c_void_p) for name in ("cu_queries", "cu_keys")),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "width")),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_int32),
    )


class _Grads(ctypes.Structure):
    """CosmosAttentionGrads."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad_out", "lse", "dq", "dk", "dv")),
        *((name, ctypes.c_int64) for name in ("grad_row", "dq_row", "dk_row", "dv_row")),
    )


_FORWARD_ARGUMENTS = (ctypes.POINTER(_Attention), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
_BACKWARD_ARGUMENTS = (ctypes.POINTER(_Attention), ctypes.POINTER(_Grads), ctypes.c_int32)


def why_missing() -> str | None:
    """None where the CPU library is loaded, else why it is not."""
    return native.why_missing("cpu")


def why_unsupported(q_THd: Tensor, k_SHd: Tensor, v_SHd: Tensor, longest: Tensor | None = None) -> str | None:
    """None where the kernels take these tensors, else why not. `longest` has as many elements as a sequence tokens."""
    if q_THd.device.type != "cpu":
        return "CPU only"
    if q_THd.dtype != torch.float32:
        return f"fp32 only, not {str(q_THd.dtype).removeprefix('torch.')}"
    if q_THd.shape[2] % LANES:
        return f"head width {q_THd.shape[2]} is not a multiple of {LANES}"
    if longest is not None and len(longest) > LONGEST:
        return f"sequences of at most {LONGEST} tokens, not {len(longest)}"
    return None


def forward(
    q_THd: Tensor, k_SHd: Tensor, v_SHd: Tensor, cu_queries: Tensor, cu_keys: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention by sequences, and the log-sum-exp of every row, which `backward` wants.

    Args:
        q_THd, k_SHd, v_SHd: fp32 on the CPU; the channels of a row contiguous, heads side by side, rows in any stride.
        cu_queries, cu_keys: int32 [N + 1], rows where sequences begin, and the end.
        causal: query i of n sees the first m - n + i + 1 of m keys; only where n <= m.

    Returns:
        [T, H, d] contiguous, and [T, H]; both fp32.
    """
    q, k, v = (_rows(x) for x in (q_THd, k_SHd, v_SHd))
    out, lse = torch.empty(q.shape), torch.empty(q.shape[:2])
    call = native.function("cpu", "cosmos_attention_forward_cpu", _FORWARD_ARGUMENTS, ctypes.c_int32)
    attention = _attention(q, k, v, cu_queries, cu_keys, causal)
    _check(call(attention, out.data_ptr(), lse.data_ptr(), torch.get_num_threads()))
    return out, lse


def backward(
    grad_THd: Tensor,
    q_THd: Tensor,
    k_SHd: Tensor,
    v_SHd: Tensor,
    lse_TH: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values: views of one [T, 3, H, d] matrix where there are as many queries as keys,
    else those of keys and values of one [S, 2, H, d] matrix.
    """
    grad, q, k, v = (_rows(x) for x in (grad_THd, q_THd, k_SHd, v_SHd))
    tokens, heads, width = k.shape
    if q.shape == k.shape:
        dq, dk, dv = torch.empty(tokens, 3, heads, width).unbind(1)
    else:
        dq = torch.empty(q.shape)
        dk, dv = torch.empty(tokens, 2, heads, width).unbind(1)
    tables = (grad, lse_TH, dq, dk, dv)
    grads = _Grads(*(x.data_ptr() for x in tables), *(x.stride(0) for x in (grad, dq, dk, dv)))
    call = native.function("cpu", "cosmos_attention_backward_cpu", _BACKWARD_ARGUMENTS, ctypes.c_int32)
    _check(call(_attention(q, k, v, cu_queries, cu_keys, causal), grads, torch.get_num_threads()))
    return dq, dk, dv


def _rows(x: Tensor) -> Tensor:
    """`x` itself where its heads lie side by side, else a copy."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _attention(q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, causal: bool) -> _Attention:
    _, heads, width = q.shape
    pointers = (x.data_ptr() for x in (q, k, v))
    rows = (x.stride(0) for x in (q, k, v))
    borders = (cu_queries.data_ptr(), cu_keys.data_ptr())
    return _Attention(*pointers, *rows, *borders, len(cu_queries) - 1, heads, width, width**-0.5, int(causal))


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"attention on the CPU: status {status} ({'no memory' if status == -2 else 'bad argument'})")
