"""Gradients of attention over packed short sequences, in Triton, from the inputs, the output and the log-sum-exps.

With the notation of `attention_triton`, P = exp(S - lse) and dO the gradient of the output:

    dP = dO v^T         dS = P (dP - rowsum(dO out))
    dv = P^T dO         dk = dS^T q / sqrt(d)         dq = dS k / sqrt(d)

One program a head and a sequence, or a tile of short ones, in one launch: its queries stay where they are, and its keys
pass by in blocks. A block sees every query of its sequences, so its dk and dv are complete at once; dq is summed in
registers over the blocks. No atomics: the same bits every time. More than 128 queries with heads of more than 64
channels are cut into blocks (before Hopper more than 64), and dk and dv summed over them afterwards.

Shapes and bytes: as in the forward pass; q, k, v, out, dO read once, dq, dk, dv written once.

Checked in Triton's interpreter and compiled for sm_80/sm_90/sm_100; not yet run on hardware.

Axes: N sequences, T packed queries, S packed keys, H heads, d channels of a head.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos_kernels import triton_support
from cosmos_kernels.attention_parts import (
    MAX_HEAD_DIM,
    MAX_TOKENS,
    WIDE_HEAD,
    Run,
    architecture,
    empty_like_views,
    readable,
    sharing,
    why_too_long,
)
from cosmos_kernels.pool_parts import block_size
from cosmos_kernels.triton_support import AheadCase


@triton.jit
def visible_keys(cu_queries_ptr, cu_keys_ptr, first, end, rows, SHARING: tl.constexpr, CAUSAL: tl.constexpr):
    """The packed keys [low, high) that packed queries `rows` see, in `SHARING` sequences from `first` on."""
    low = tl.zeros_like(rows)
    high = tl.zeros_like(rows)
    for i in tl.static_range(SHARING):
        sequence = tl.minimum(first + i, end - 1)  # the last one may come twice, which changes nothing
        q_begin = tl.load(cu_queries_ptr + sequence)
        q_end = tl.load(cu_queries_ptr + sequence + 1)
        k_begin = tl.load(cu_keys_ptr + sequence)
        k_end = tl.load(cu_keys_ptr + sequence + 1)
        inside = (rows >= q_begin) & (rows < q_end)
        low = tl.where(inside, k_begin, low)
        if CAUSAL:
            k_end = k_end - (q_end - 1 - rows)
        high = tl.where(inside, k_end, high)
    return low, high


# Numbers that change with every batch: no code of their own for some of them.
@triton.jit(do_not_specialize=["begin", "end", "T"])
def _backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    grad_ptr,
    lse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    cu_queries_ptr,
    cu_keys_ptr,
    begin,  # of the launch's sequences
    end,
    T,
    H,
    scale,  # 1 / sqrt(d)
    stride_q_t,
    stride_q_h,
    stride_k_s,
    stride_k_h,
    stride_v_s,
    stride_v_h,
    stride_grad_t,
    stride_grad_h,
    stride_dq_t,
    stride_dk_s,  # and of dv
    stride_share,  # from the dk and dv of one block of queries to those of the next
    DIM: tl.constexpr,
    SHARING: tl.constexpr,  # sequences of a program
    SPLITS: tl.constexpr,  # blocks that the queries of a sequence are cut into
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # queries of a program
    BLOCK_K: tl.constexpr,  # keys of a step
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % H
    split = program // H % SPLITS
    first = begin + program // H // SPLITS * SHARING
    last = tl.minimum(first + SHARING, end)
    q_begin = tl.load(cu_queries_ptr + first) + split * BLOCK_Q
    q_end = tl.load(cu_queries_ptr + last)
    k_begin = tl.load(cu_keys_ptr + first)
    k_end = tl.load(cu_keys_ptr + last)

    offs_q = tl.arange(0, BLOCK_Q)
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d[None, :] < DIM
    mask_q = (q_begin + offs_q[:, None] < q_end) & mask_d
    # 64 bits once a tensor; within a tile 32 do.
    q_base = q_ptr + q_begin.to(tl.int64) * stride_q_t + head * stride_q_h
    k_base = k_ptr + k_begin.to(tl.int64) * stride_k_s + head * stride_k_h
    v_base = v_ptr + k_begin.to(tl.int64) * stride_v_s + head * stride_v_h
    grad_base = grad_ptr + q_begin.to(tl.int64) * stride_grad_t + head * stride_grad_h
    out_base = out_ptr + (q_begin.to(tl.int64) * H + head) * DIM
    dq_base = dq_ptr + q_begin.to(tl.int64) * stride_dq_t + head * DIM
    dk_rows = split.to(tl.int64) * stride_share + k_begin.to(tl.int64) * stride_dk_s + head * DIM
    dk_base = dk_ptr + dk_rows
    dv_base = dv_ptr + dk_rows
    q = tl.load(q_base + offs_q[:, None] * stride_q_t + offs_d[None, :], mask=mask_q, other=0.0)
    grad = tl.load(grad_base + offs_q[:, None] * stride_grad_t + offs_d[None, :], mask=mask_q, other=0.0)
    out = tl.load(out_base + offs_q[:, None] * (H * DIM) + offs_d[None, :], mask=mask_q, other=0.0)
    lse = tl.load(lse_ptr + head.to(tl.int64) * T + q_begin + offs_q, mask=q_begin + offs_q < q_end, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
        grad = grad.to(tl.float32)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    lse = lse * 1.4426950408889634
    scale_log2 = scale * 1.4426950408889634
    if CAUSAL or SHARING > 1:
        low, high = visible_keys(cu_queries_ptr, cu_keys_ptr, first, end, q_begin + offs_q, SHARING, CAUSAL)

    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start in range(0, k_end - k_begin, BLOCK_K):
        keys = k_begin + start + offs_k
        mask_k = (keys[:, None] < k_end) & mask_d
        k_offs = start + offs_k[:, None]
        k = tl.load(k_base + k_offs * stride_k_s + offs_d[None, :], mask=mask_k, other=0.0)
        v = tl.load(v_base + k_offs * stride_v_s + offs_d[None, :], mask=mask_k, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None]
        if CAUSAL or SHARING > 1:
            seen = (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
        else:  # rows beyond the last query have weights too, but their gradient is zero
            seen = keys[None, :] < k_end
        weights = tl.exp2(tl.where(seen, scores, -float("inf")))
        dv = tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision="ieee")
        tl.store(dv_base + k_offs * stride_dk_s + offs_d[None, :], dv.to(dv_ptr.dtype.element_ty), mask=mask_k)
        dweights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        dscores = tl.where(seen, weights * (dweights - delta[:, None]), 0.0).to(q.dtype)
        dk = tl.dot(tl.trans(dscores), q, input_precision="ieee") * scale
        tl.store(dk_base + k_offs * stride_dk_s + offs_d[None, :], dk.to(dk_ptr.dtype.element_ty), mask=mask_k)
        dq = tl.dot(dscores, k, dq, input_precision="ieee")
    dq_offs = offs_q[:, None] * stride_dq_t + offs_d[None, :]
    tl.store(dq_base + dq_offs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask_q)


def backward(
    grad_THd: Tensor,
    q_THd: Tensor,
    k_SHd: Tensor,
    v_SHd: Tensor,
    out_THd: Tensor,
    lse_HT: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    *,
    runs: Sequence[Run] | None = None,
    sequences_per_program: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention_triton.forward`.

    Args:
        grad_THd: gradient of `out`, in its dtype. out_THd, lse_HT: what the forward pass returned.
        The others: as in the forward pass.

    Returns:
        grad_q [T, H, d], grad_k and grad_v [S, H, d] in the dtype of q; views of one matrix where their inputs were, so
        that the projection's backward pass can read it as it is.
    """
    q_THd, k_SHd, v_SHd, grad_THd = (readable(x.detach()) for x in (q_THd, k_SHd, v_SHd, grad_THd))
    out_THd = out_THd.detach().contiguous()
    tokens, heads, dim = q_THd.shape
    runs = [Run(0, len(cu_queries) - 1, max_queries, max_keys)] if runs is None else runs
    arch = architecture(q_THd.device)
    splits = splits_for(runs, dim, sequences_per_program, arch)
    grad_q, grad_k, grad_v = empty_like_views((q_THd, k_SHd, v_SHd))
    made: tuple[Tensor, ...] = (grad_q, grad_k, grad_v)
    if splits > 1:
        shares = torch.empty(splits, len(k_SHd), 2, heads, dim, dtype=torch.float32, device=q_THd.device)
        made = grad_q, *shares.unbind(2)
    strides = [stride for x in (q_THd, k_SHd, v_SHd, grad_THd) for stride in x.stride()[:2]]
    strides += [grad_q.stride(0), made[1].stride(-3), made[1].stride(0) if splits > 1 else 0]
    with triton_support.launch_device(q_THd):
        for run in runs:
            assert not (reason := why_too_long(run.max_queries, run.max_keys)), reason
            options = backward_options(run.max_queries, run.max_keys, dim, sequences_per_program, splits, arch)
            _backward_kernel[(triton.cdiv(run.count, options["SHARING"]) * splits * heads,)](
                *(q_THd, k_SHd, v_SHd, out_THd, grad_THd, lse_HT, *made),
                *(cu_queries, cu_keys, run.first, run.first + run.count, tokens, heads, dim**-0.5, *strides),
                DIM=dim,
                CAUSAL=causal,
                UPCAST=triton_support.upcast(q_THd.dtype),
                **options,
            )
    if splits > 1:
        grad_k, grad_v = shares.sum(0).unbind(1)
    return grad_q.to(q_THd.dtype), grad_k.to(q_THd.dtype), grad_v.to(q_THd.dtype)


def splits_for(runs: Sequence[Run], dim: int, share: int | None, arch: int) -> int:
    """Programs that the queries of a tile are spread over: one, unless dq of a wide head would not fit one's registers.
    Then each has a share of dk and dv, which are added up afterwards."""
    if dim <= WIDE_HEAD:
        return 1
    rows = ((share or sharing(run.max_queries, run.max_keys)) * run.max_queries for run in runs)
    return triton.cdiv(max(rows, default=1), _max_wide_queries(arch))


def _max_wide_queries(arch: int) -> int:
    return 128 if arch >= 90 else 64


def backward_options(
    max_queries: int, max_keys: int, dim: int, share: int | None = None, splits: int = 1, arch: int = 90
) -> dict[str, int]:
    """Block sizes and warps for sequences of at most these lengths."""
    share = share or sharing(max_queries, max_keys)
    query_block = block_size(share * max_queries, _max_wide_queries(arch) if dim > WIDE_HEAD else MAX_TOKENS)
    # The most that does not spill; before Hopper both operands of a product lie in registers.
    if arch < 90:
        key_block = 32 if query_block <= 64 and dim <= WIDE_HEAD else 16
    else:
        key_block = 64 if query_block <= 128 and dim <= WIDE_HEAD else 32
    key_block = block_size(share * max_keys, key_block)
    return {
        "SHARING": share,
        "SPLITS": splits,
        "BLOCK_Q": query_block,
        "BLOCK_K": key_block,
        "BLOCK_D": block_size(dim, MAX_HEAD_DIM),
        "num_warps": 8 if query_block > 64 else 4 if query_block > 32 else 2,
        "num_stages": 1,
    }


def case_name(queries: int, keys: int, dim: int, causal: bool, options: dict[str, int]) -> str:
    """What is compiled ahead: lengths, head width, mask, sequences of a program, tile."""
    mask = "causal" if causal else "full"
    return f"{queries}x{keys}/d{dim}/{mask}/share{options['SHARING']}/{options['BLOCK_Q']}x{options['BLOCK_K']}"


def merged(cases: Iterable[AheadCase]) -> list[AheadCase]:
    """Cases of single architectures; those of one name are alike, and become one."""
    found: dict[str, AheadCase] = {}
    for case in cases:
        known = found.get(case.name)
        found[case.name] = case if known is None else replace(case, archs=known.archs + case.archs)
    return list(found.values())


def _ahead(arch: int, queries: int, keys: int, dim: int, causal: bool, share: int | None = None) -> AheadCase:
    """bf16 heads of a [T, 3 H d] matrix."""
    splits = splits_for([Run(0, 1, queries, keys)], dim, share, arch)
    options = backward_options(queries, keys, dim, share, splits, arch)
    ends = ("q_t", "q_h", "k_s", "k_h", "v_s", "v_h", "grad_t", "grad_h", "dq_t", "dk_s", "share")
    strides = tuple(f"stride_{end}" for end in ends)
    return AheadCase(
        name=f"backward_kernel/{case_name(queries, keys, dim, causal, options)}",
        kernel=_backward_kernel,
        signature={
            **{f"{name}_ptr": "*bf16" for name in ("q", "k", "v", "out", "grad", "dq")},
            **dict.fromkeys(("dk_ptr", "dv_ptr"), "*fp32" if options["SPLITS"] > 1 else "*bf16"),
            **{"lse_ptr": "*fp32", "cu_queries_ptr": "*i32", "cu_keys_ptr": "*i32", "scale": "fp32"},
            **dict.fromkeys(("begin", "end", "T", "H", *strides), "i32"),
        },
        num_warps=options.pop("num_warps"),
        num_stages=options.pop("num_stages"),
        constexprs={"DIM": dim, "CAUSAL": causal, "UPCAST": False, **options},
        divisible_by_16=strides,
        archs=(arch,),
    )


# Queries, keys, channels of a head, causal, sequences of a program: crops, captions, and single queries of both.
AHEAD_SIZES: tuple[tuple[Any, ...], ...] = (
    (197, 197, 64, False),
    (197, 197, 128, False),
    (37, 37, 64, False),
    (37, 37, 64, False, 1),
    (77, 77, 64, True),
    (1, 197, 64, False),
    (1, 39, 64, True),
)
COMPILE_AHEAD = merged(_ahead(arch, *sizes) for sizes in AHEAD_SIZES for arch in triton_support.ARCHITECTURES)
