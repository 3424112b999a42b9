"""CUDA backend of the cross-attention pooling: csrc/pool_forward_cuda.cu and csrc/pool_backward_cuda.cu.

One block a sample (and 64 rows) on the tensor cores: all scores first, the LayerNorm of the tokens applied to scores
and sums, an exact softmax in fp32. The backward recomputes the scores from tokens and log-sum-exps and writes nothing
but its results. fp16 or bf16 tokens, at most 256 of them.

Checked on a CPU in the emulation of csrc/emulation and compiled for sm_80 and sm_90a without spills; not yet run on
hardware.

Axes: B batch, L tokens, M rows of a sample (views times heads), D embedding.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import native, triton_support

DTYPES = {torch.float16: 0, torch.bfloat16: 1}
MAX_TOKENS = 256
MAX_ROWS = 64  # of the backward kernel; more are taken in parts
LAYER_NORM_EPS = 1e-5
ALIGNMENT = 8  # elements: rows begin at multiples of 16 bytes
# sizeof(Shared) in csrc, by the tokens a tile holds: of the backward kernel; of 256 tokens the forward kernel's.
SHARED_BYTES = {64: 69_696, 128: 104_000, 256: 160_000}


class _Shape(ctypes.Structure):
    """CosmosPoolShape."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "length", "rows", "dim", "batch_stride", "token_stride")),
        ("eps", ctypes.c_float),
    )


class _Forward(ctypes.Structure):
    """CosmosPoolForward."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tokens", "queries", "attended", "lse")),
        ("shape", _Shape),
    )


class _Backward(ctypes.Structure):
    """CosmosPoolBackward."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tokens", "queries", "grad_attended", "lse")),
        *((name, ctypes.c_void_p) for name in ("attended", "grad_queries", "grad_tokens")),
        ("shape", _Shape),
    )


_BACKWARD_ARGUMENTS = (ctypes.POINTER(_Backward), ctypes.c_int32, ctypes.c_void_p)
_FORWARD_ARGUMENTS = (ctypes.POINTER(_Forward), ctypes.c_int32, ctypes.c_void_p)


def why_unsupported(tokens_BLD: Tensor, *_: Tensor) -> str | None:
    """None where the kernels take these tokens, else the reason."""
    if tokens_BLD.dtype not in DTYPES:
        return f"tokens in {tokens_BLD.dtype}: its tensor-core kernels take float16 or bfloat16"
    if tokens_BLD.shape[1] > MAX_TOKENS:
        return f"{tokens_BLD.shape[1]} tokens, it takes at most {MAX_TOKENS}"
    if tokens_BLD.shape[2] % ALIGNMENT:
        return f"D = {tokens_BLD.shape[2]}, it takes multiples of {ALIGNMENT}"
    if not tokens_BLD.is_cuda:
        return f"tokens on {tokens_BLD.device}, it needs CUDA tensors"
    wanted = next(size for tokens, size in SHARED_BYTES.items() if tokens_BLD.shape[1] <= tokens)
    limit = triton_support.shared_bytes(tokens_BLD.device)
    if wanted > limit:
        return f"{tokens_BLD.shape[1]} tokens take {wanted} bytes of shared memory, a block has {limit} on this GPU"
    return None


def attend(tokens_BLD: Tensor, queries_BMD: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax-weighted means of the normalised tokens.

    Args:
        tokens_BLD: [B, L, D], fp16 or bf16, L <= 256, D a multiple of 8; any strides.
        queries_BMD: [B, M, D] of the same dtype, scaled.

    Returns:
        attended [B, M, D] in that dtype, and the log-sum-exps of the scores [B, M] in fp32.

    Raises:
        RuntimeError: the library is missing, or CUDA reports an error.
    """
    batch, rows, _ = queries_BMD.shape
    tokens_BLD, queries_BMD = _readable(tokens_BLD.detach()), _readable(queries_BMD.detach().contiguous())
    attended_BMD = torch.empty_like(queries_BMD)
    lse_BM = torch.empty((batch, rows), dtype=torch.float32, device=queries_BMD.device)
    tensors = (tokens_BLD, queries_BMD, attended_BMD, lse_BM)
    call = _Forward(*(tensor.data_ptr() for tensor in tensors), _shape(tokens_BLD, rows))
    native.run_on_stream(
        native.function("cuda", "cosmos_pool_forward", _FORWARD_ARGUMENTS, ctypes.c_int32),
        tokens_BLD,
        ctypes.byref(call),
        DTYPES[tokens_BLD.dtype],
    )
    return attended_BMD, lse_BM


def attend_backward(
    tokens_BLD: Tensor, queries_BMD: Tensor, lse_BM: Tensor, grad_attended_BMD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` from its inputs and log-sum-exps.

    Args:
        tokens_BLD, queries_BMD: as in the forward pass. lse_BM: what it returned.
        grad_attended_BMD: gradient of `attended`, in its dtype.

    Returns:
        attended [B, M, D] once more, grad_queries [B, M, D] and grad_tokens [B, L, D], all in the tokens' dtype.

    Raises:
        RuntimeError: the library is missing, or CUDA reports an error.
    """
    parts = [
        _attend_backward(tokens_BLD, *rows)
        for rows in zip(*(rows.split(MAX_ROWS, 1) for rows in (queries_BMD, lse_BM, grad_attended_BMD)), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    attended, grad_queries, grad_tokens = zip(*parts, strict=True)
    return torch.cat(attended, 1), torch.cat(grad_queries, 1), torch.stack(grad_tokens).sum(0)


def _attend_backward(
    tokens_BLD: Tensor, queries_BMD: Tensor, lse_BM: Tensor, grad_attended_BMD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for at most MAX_ROWS rows a sample."""
    tokens_BLD, queries_BMD, grad_attended_BMD = (
        _readable(x.detach()) for x in (tokens_BLD, queries_BMD.contiguous(), grad_attended_BMD.contiguous())
    )
    lse_BM = lse_BM.detach().contiguous()
    made = (torch.empty_like(queries_BMD), torch.empty_like(queries_BMD))
    grad_tokens_BLD = torch.empty(tuple(tokens_BLD.shape), dtype=tokens_BLD.dtype, device=tokens_BLD.device)
    tensors = (tokens_BLD, queries_BMD, grad_attended_BMD, lse_BM, *made, grad_tokens_BLD)
    call = _Backward(*(tensor.data_ptr() for tensor in tensors), _shape(tokens_BLD, queries_BMD.shape[1]))
    native.run_on_stream(
        native.function("cuda", "cosmos_pool_backward", _BACKWARD_ARGUMENTS, ctypes.c_int32),
        tokens_BLD,
        ctypes.byref(call),
        DTYPES[tokens_BLD.dtype],
    )
    return *made, grad_tokens_BLD


def _shape(tokens_BLD: Tensor, rows: int) -> _Shape:
    batch, length, dim = tokens_BLD.shape
    return _Shape(batch, length, rows, dim, *tokens_BLD.stride()[:2], LAYER_NORM_EPS)


def _readable(x_BND: Tensor) -> Tensor:
    """As it is where every row is contiguous and begins at a multiple of 16 bytes, else a contiguous copy."""
    (batch_stride, row_stride, stride), address = x_BND.stride(), x_BND.data_ptr()
    aligned = stride == 1 and batch_stride % ALIGNMENT == 0 and row_stride % ALIGNMENT == 0 and address % 16 == 0
    return x_BND if aligned else x_BND.clone(memory_format=torch.contiguous_format)
