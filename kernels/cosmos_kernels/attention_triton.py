"""Attention over packed short sequences, in Triton: the forward pass.

    S_ij = q_i . k_j / sqrt(d)        j: the keys that query i sees
    out_i = sum_j exp(S_ij - lse_i) v_j,   lse_i = log sum_j exp S_ij

A program takes a head and a sequence: all keys and values stay on the chip (at most 256), the queries pass by in blocks
of 64. The scores of a row are complete at once, so the softmax is exact in one step and nothing is rescaled. Short
sequences share a program: their rows lie one behind the other, and each sees the keys of its own sequence only, a
block-diagonal mask. A causal mask is aligned to the end: query i of n sees the first m - n + i + 1 of m keys, so a
single query of a caption sees all keys up to its own.

Shapes: q [T, H, d], k and v [S, H, d], any strides with contiguous channels (views of one [T, 3 H d] matrix are read
where they lie), out [T, H, d], lse [H, T] fp32; bf16 or fp16, products accumulate in fp32, all else is fp32.
`cu_queries` and `cu_keys` [N + 1] int32: where sequences begin, and the end. Bytes moved: q, k, v read, out and lse
written, once.

A NaN reaches every sequence of its program: 0 times NaN is NaN.

Checked in Triton's interpreter and compiled for sm_80/sm_90/sm_100; not yet run on hardware.

Axes: N sequences, T packed queries, S packed keys, H heads, d channels of a head.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos_kernels import triton_support
from cosmos_kernels.attention_backward_triton import AHEAD_SIZES, backward, case_name, merged, visible_keys
from cosmos_kernels.attention_parts import (
    MAX_HEAD_DIM,
    MAX_TOKENS,
    Run,
    architecture,
    readable,
    sharing,
    why_too_long,
)
from cosmos_kernels.pool_parts import block_size, stored_dtype
from cosmos_kernels.triton_support import AheadCase

__all__ = ["COMPILE_AHEAD", "backward", "forward"]


# Numbers that change with every batch: no code of their own for some of them.
@triton.jit(do_not_specialize=["begin", "end", "T"])
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_queries_ptr,
    cu_keys_ptr,
    begin,  # of the launch's sequences
    end,
    T,
    H,
    scale_log2,  # log2(e) / sqrt(d)
    stride_q_t,
    stride_q_h,
    stride_k_s,
    stride_k_h,
    stride_v_s,
    stride_v_h,
    DIM: tl.constexpr,
    SHARING: tl.constexpr,  # sequences of a program
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # queries of a step
    BLOCK_K: tl.constexpr,  # all keys of a program
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % H
    first = begin + program // H * SHARING
    last = tl.minimum(first + SHARING, end)
    q_begin = tl.load(cu_queries_ptr + first)
    q_end = tl.load(cu_queries_ptr + last)
    k_begin = tl.load(cu_keys_ptr + first)
    k_end = tl.load(cu_keys_ptr + last)

    offs_q = tl.arange(0, BLOCK_Q)
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d[None, :] < DIM
    mask_k = (k_begin + offs_k[:, None] < k_end) & mask_d
    # 64 bits once a tensor; within a tile 32 do.
    q_base = q_ptr + q_begin.to(tl.int64) * stride_q_t + head * stride_q_h
    k_base = k_ptr + k_begin.to(tl.int64) * stride_k_s + head * stride_k_h
    v_base = v_ptr + k_begin.to(tl.int64) * stride_v_s + head * stride_v_h
    out_base = out_ptr + (q_begin.to(tl.int64) * H + head) * DIM
    k = tl.load(k_base + offs_k[:, None] * stride_k_s + offs_d[None, :], mask=mask_k, other=0.0)
    v = tl.load(v_base + offs_k[:, None] * stride_v_s + offs_d[None, :], mask=mask_k, other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    keys = k_begin + offs_k[None, :]

    for start in range(0, q_end - q_begin, BLOCK_Q):
        rows = q_begin + start + offs_q
        mask_q = (rows[:, None] < q_end) & mask_d
        q_offs = start + offs_q[:, None]
        q = tl.load(q_base + q_offs * stride_q_t + offs_d[None, :], mask=mask_q, other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if CAUSAL or SHARING > 1:
            low, high = visible_keys(cu_queries_ptr, cu_keys_ptr, first, end, rows, SHARING, CAUSAL)
            scores = tl.where((keys >= low[:, None]) & (keys < high[:, None]), scores, -float("inf"))
        else:
            scores = tl.where(keys < k_end, scores, -float("inf"))
        peak = tl.maximum(tl.max(scores, 1), -1e30)  # finite where a row sees nothing
        weights = tl.exp2(scores - peak[:, None])
        total = tl.sum(weights, 1)
        total = tl.where(total == 0.0, 1.0, total)
        out = tl.dot(weights.to(v.dtype), v, input_precision="ieee") / total[:, None]
        tl.store(out_base + q_offs * (H * DIM) + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask_q)
        lse = (peak + tl.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + head.to(tl.int64) * T + rows, lse, mask=rows < q_end)


def forward(
    q_THd: Tensor,
    k_SHd: Tensor,
    v_SHd: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    *,
    runs: Sequence[Run] | None = None,
    sequences_per_program: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax-weighted sums of the values, sequence by sequence.

    Args:
        q_THd: [T, H, d] packed queries; k_SHd, v_SHd: [S, H, d] packed keys and values; bf16 or fp16 (fp32 in the
            interpreter), d <= 128.
        cu_queries, cu_keys: [N + 1] int32, begins of the sequences and the end.
        max_queries, max_keys: longest of them, at most 256.
        causal: query i of n sees the first m - n + i + 1 of m keys.
        runs: `attention_parts.runs` of the lengths, where the host knows them: a launch each, with tiles that fit.
        sequences_per_program: for benchmarks; default: what `attention_parts.sharing` takes to be best.

    Returns:
        out [T, H, d] in the dtype of q (zero where a query sees no key), lse [H, T] in fp32.
    """
    q_THd, k_SHd, v_SHd = (readable(x.detach()) for x in (q_THd, k_SHd, v_SHd))
    tokens, heads, dim = q_THd.shape
    out_THd = torch.empty(tokens, heads, dim, dtype=stored_dtype(q_THd), device=q_THd.device)
    lse_HT = torch.empty(heads, tokens, dtype=torch.float32, device=q_THd.device)
    strides = [stride for x in (q_THd, k_SHd, v_SHd) for stride in x.stride()[:2]]
    arch = architecture(q_THd.device)
    with triton_support.launch_device(q_THd):
        for run in [Run(0, len(cu_queries) - 1, max_queries, max_keys)] if runs is None else runs:
            assert not (reason := why_too_long(run.max_queries, run.max_keys)), reason
            options = forward_options(run.max_queries, run.max_keys, dim, sequences_per_program, arch)
            _forward_kernel[(triton.cdiv(run.count, options["SHARING"]) * heads,)](
                *(q_THd, k_SHd, v_SHd, out_THd, lse_HT, cu_queries, cu_keys),
                *(run.first, run.first + run.count, tokens, heads, dim**-0.5 * 1.4426950408889634, *strides),
                DIM=dim,
                CAUSAL=causal,
                UPCAST=triton_support.upcast(q_THd.dtype),
                **options,
            )
    return out_THd.to(q_THd.dtype), lse_HT


def forward_options(
    max_queries: int, max_keys: int, dim: int, share: int | None = None, arch: int = 90
) -> dict[str, int]:
    """Block sizes and warps for sequences of at most these lengths."""
    share = share or sharing(max_queries, max_keys)
    key_block = block_size(share * max_keys, MAX_TOKENS)
    # Before Hopper both operands of a product lie in registers: 64 queries beside 256 keys spill.
    query_block = block_size(share * max_queries, 32 if arch < 90 and key_block > 128 else 64)
    scores = query_block * key_block
    return {
        "SHARING": share,
        "BLOCK_Q": query_block,
        "BLOCK_K": key_block,
        "BLOCK_D": block_size(dim, MAX_HEAD_DIM),
        "num_warps": 8 if scores * dim > 64 * 256 * 64 else 4 if scores > 32 * 32 else 2,
        "num_stages": 1,
    }


def _ahead(arch: int, queries: int, keys: int, dim: int, causal: bool, share: int | None = None) -> AheadCase:
    """bf16 heads of a [T, 3 H d] matrix."""
    options = forward_options(queries, keys, dim, share, arch)
    strides = tuple(f"stride_{name}" for name in ("q_t", "q_h", "k_s", "k_h", "v_s", "v_h"))
    return AheadCase(
        name=f"forward_kernel/{case_name(queries, keys, dim, causal, options)}",
        kernel=_forward_kernel,
        signature={
            **{f"{name}_ptr": "*bf16" for name in ("q", "k", "v", "out")},
            **{"lse_ptr": "*fp32", "cu_queries_ptr": "*i32", "cu_keys_ptr": "*i32", "scale_log2": "fp32"},
            **dict.fromkeys(("begin", "end", "T", "H", *strides), "i32"),
        },
        num_warps=options.pop("num_warps"),
        num_stages=options.pop("num_stages"),
        constexprs={"DIM": dim, "CAUSAL": causal, "UPCAST": False, **options},
        divisible_by_16=strides,
        archs=(arch,),
    )


COMPILE_AHEAD = merged(_ahead(arch, *sizes) for sizes in AHEAD_SIZES for arch in triton_support.ARCHITECTURES)
