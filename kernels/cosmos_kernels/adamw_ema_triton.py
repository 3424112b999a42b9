"""The optimizer step in Triton: the norm of the gradients, and AdamW with the teacher's average over many tensors.

    norm    sqrt(sum over all elements of all gradients of g^2)
    ema <- ema + (1 - ema_decay) (p - ema),  g' = s g,  m <- m + (1 - beta1) (g' - m),  v <- beta2 v + (1 - beta2) g'^2,
    p   <- (1 - lr weight_decay) p - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps),
    clamp, copies                           s: the caller's factors times min(1, clip_norm / (|factors| norm + 1e-6))

All tensors fp32 and contiguous, copies bf16. One launch for all tensors: a table of addresses, sizes and constants goes
to the device through pinned memory, so that nothing waits for it; a program updates BLOCK elements of one tensor and
finds out which by a map that is kept for a list of sizes. 36 bytes an element, 2 more a copy; the norm reads 4. The
norm adds in a fixed order, single precision within a block and double between blocks: the same bits every time.

Checked in Triton's interpreter and compiled for sm_80/sm_90/sm_100; not yet run on hardware.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_support
from .adamw_ema_call import AdamwEmaOptions, AdamwEmaTensors
from .triton_support import AheadCase

BLOCK = 2048
NUM_WARPS = 8
ROWS = 8  # of the table: addresses of p, g, m, v, ema, copy of p, copy of ema; size
CONSTANTS = 4  # decay, step size, 1 / sqrt(second correction), clamped (0 or 1)


@triton.jit
def _pointers(table_ptr, row, tensors, tensor, begin, offs, ALIGNED: tl.constexpr, TYPE: tl.constexpr):
    """To elements begin + offs of the array that row `row` of the table names; begin is a multiple of BLOCK."""
    ptrs = tl.load(table_ptr + row * tensors + tensor).to(tl.pointer_type(TYPE)) + begin + offs
    if ALIGNED:
        ptrs = tl.multiple_of(
            ptrs, 16
        )  # said of the sum: the compiler forgets what it knew of an address made from int
    return ptrs


@triton.jit
def _bf16_bits(x):
    """x rounded to the nearest bf16, ties to even, as int16: also where the interpreter's own rounding truncates."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def _update(
    table_ptr,
    constants_ptr,
    tensors,
    tensor,
    begin,
    size,
    scale,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    one_minus_ema,
    low,
    high,
    HAS_EMA: tl.constexpr,
    PARAM_COPY: tl.constexpr,
    EMA_COPY: tl.constexpr,
    CLAMPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.arange(0, BLOCK)
    mask = None if WHOLE else begin + offs < size
    p_ptrs = _pointers(table_ptr, 0, tensors, tensor, begin, offs, ALIGNED, tl.float32)
    m_ptrs = _pointers(table_ptr, 2, tensors, tensor, begin, offs, ALIGNED, tl.float32)
    v_ptrs = _pointers(table_ptr, 3, tensors, tensor, begin, offs, ALIGNED, tl.float32)
    p = tl.load(p_ptrs, mask=mask)
    g = tl.load(_pointers(table_ptr, 1, tensors, tensor, begin, offs, ALIGNED, tl.float32), mask=mask)
    m = tl.load(m_ptrs, mask=mask)
    v = tl.load(v_ptrs, mask=mask)
    decay = tl.load(constants_ptr + tensor)
    step_size = tl.load(constants_ptr + tensors + tensor)
    inv_sqrt_correction2 = tl.load(constants_ptr + 2 * tensors + tensor)
    if CLAMPS:
        clamped = tl.load(constants_ptr + 3 * tensors + tensor) != 0.0
        low = tl.where(clamped, low, float("-inf"))
        high = tl.where(clamped, high, float("inf"))
    if HAS_EMA:
        ema_ptrs = _pointers(table_ptr, 4, tensors, tensor, begin, offs, ALIGNED, tl.float32)
        ema = tl.load(ema_ptrs, mask=mask)
        ema += one_minus_ema * (p - ema)
        if CLAMPS:
            ema = tl.where(ema < low, low, tl.where(ema > high, high, ema))  # NaN stays NaN
        tl.store(ema_ptrs, ema, mask=mask)
        if EMA_COPY:
            tl.store(
                _pointers(table_ptr, 6, tensors, tensor, begin, offs, ALIGNED, tl.int16), _bf16_bits(ema), mask=mask
            )
    g = scale * g
    m += one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * (g * g)
    p = decay * p - step_size * tl.div_rn(m, tl.sqrt_rn(v) * inv_sqrt_correction2 + eps)
    if CLAMPS:
        p = tl.where(p < low, low, tl.where(p > high, high, p))  # NaN stays NaN
    tl.store(p_ptrs, p, mask=mask)
    tl.store(m_ptrs, m, mask=mask)
    tl.store(v_ptrs, v, mask=mask)
    if PARAM_COPY:
        tl.store(_pointers(table_ptr, 5, tensors, tensor, begin, offs, ALIGNED, tl.int16), _bf16_bits(p), mask=mask)


@triton.jit
def _adamw_ema_kernel(
    table_ptr,  # int64 [ROWS, tensors]
    constants_ptr,  # fp32 [CONSTANTS, tensors]
    owner_ptr,  # int32 [programs]: the tensor of each program
    first_ptr,  # int32 [tensors]: the first program of each tensor
    tensors,
    grad_scale,
    grad_scale_ptr,
    norm_ptr,
    clip_norm,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    one_minus_ema,
    low,
    high,
    CLIP: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    HAS_EMA: tl.constexpr,
    PARAM_COPY: tl.constexpr,
    EMA_COPY: tl.constexpr,
    CLAMPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = grad_scale
    if grad_scale_ptr is not None:
        scale *= tl.load(grad_scale_ptr)
    norm = 0.0
    if norm_ptr is not None:
        norm = tl.load(norm_ptr)
    if CLIP:
        factor = tl.div_rn(clip_norm, tl.abs(scale) * norm + 1e-6)
        scale = tl.where(factor >= 1.0, scale, scale * factor)  # NaN goes through
    if (not SKIP_NONFINITE) or norm - norm == 0.0:
        tensor = tl.load(owner_ptr + tl.program_id(0))
        begin = (tl.program_id(0) - tl.load(first_ptr + tensor)).to(tl.int64) * BLOCK
        size = tl.load(table_ptr + 7 * tensors + tensor)
        if begin + BLOCK <= size:
            _update(
                table_ptr, constants_ptr, tensors, tensor, begin, size, scale, one_minus_beta1, beta2, one_minus_beta2,
                eps, one_minus_ema, low, high, HAS_EMA, PARAM_COPY, EMA_COPY, CLAMPS, ALIGNED, True, BLOCK,
            )  # fmt: skip
        else:
            _update(
                table_ptr, constants_ptr, tensors, tensor, begin, size, scale, one_minus_beta1, beta2, one_minus_beta2,
                eps, one_minus_ema, low, high, HAS_EMA, PARAM_COPY, EMA_COPY, CLAMPS, ALIGNED, False, BLOCK,
            )  # fmt: skip


@triton.jit
def _squares_kernel(
    table_ptr,  # int64 [2, tensors]: addresses, sizes
    owner_ptr,
    first_ptr,
    partial_ptr,  # fp32 [programs]
    tensors,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = tl.load(owner_ptr + tl.program_id(0))
    begin = (tl.program_id(0) - tl.load(first_ptr + tensor)).to(tl.int64) * BLOCK
    size = tl.load(table_ptr + tensors + tensor)
    offs = tl.arange(0, BLOCK)
    ptrs = _pointers(table_ptr, 0, tensors, tensor, begin, offs, ALIGNED, tl.float32)
    if begin + BLOCK <= size:
        x = tl.load(ptrs)
        total = tl.sum(x * x)
    else:
        x = tl.load(ptrs, mask=begin + offs < size, other=0.0)
        total = tl.sum(x * x)
    tl.store(partial_ptr + tl.program_id(0), total)


@triton.jit
def _norm_kernel(partial_ptr, norm_ptr, partials, BLOCK: tl.constexpr):
    sums = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, partials, BLOCK):
        offs = begin + tl.arange(0, BLOCK)
        sums += tl.load(partial_ptr + offs, mask=offs < partials, other=0.0).to(tl.float64)
    tl.store(norm_ptr, tl.sqrt(tl.sum(sums)).to(tl.float32))  # the rounded root, for fp64


@functools.lru_cache(maxsize=64)
def _programs(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The tensor of each program [programs], the first program of each tensor [tensors]; int32 on the device."""
    counts = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes])
    owner = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    return owner.to(device, torch.int32), (counts.cumsum(0) - counts).to(device, torch.int32)


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    """A copy that nothing waits for: pinned memory is not reused before the device has read it."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _aligned(addresses: Sequence[int]) -> bool:
    return all(address % 16 == 0 for address in addresses)


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm of fp32 contiguous gradients of one device, 0-dim fp32 there."""
    sizes, addresses = tuple(grad.numel() for grad in grads), [grad.data_ptr() for grad in grads]
    device = grads[0].device
    owner, first = _programs(sizes, device)
    table = _to_device(torch.tensor([addresses, sizes], dtype=torch.int64), device)
    partial, norm = grads[0].new_empty(len(owner)), grads[0].new_empty(())
    with triton_support.launch_device(norm):
        if len(owner):
            _squares_kernel[(len(owner),)](
                table, owner, first, partial, len(grads), _aligned(addresses), BLOCK, num_warps=4
            )
        _norm_kernel[(1,)](partial, norm, len(owner), 1024, num_warps=4)
    return norm


def adamw_ema_(t: AdamwEmaTensors, o: AdamwEmaOptions) -> None:
    """One step over fp32 contiguous tensors of one device, in place; copies bf16."""
    device, sizes = t.params[0].device, tuple(param.numel() for param in t.params)
    owner, first = _programs(sizes, device)
    if not len(owner):
        return
    table, aligned = _table(t, sizes)
    constants = torch.tensor(
        [
            [1.0 - o.lr * decay for decay in t.weight_decays],
            [o.lr / (1.0 - o.beta1**step) for step in t.steps],
            [1.0 / math.sqrt(1.0 - o.beta2**step) for step in t.steps],
            t.clamped,
        ],
        dtype=torch.float32,
    )
    with triton_support.launch_device(t.params[0]):
        _adamw_ema_kernel[(len(owner),)](
            _to_device(table, device),
            _to_device(constants, device),
            owner,
            first,
            len(sizes),
            o.grad_scale,
            t.grad_scale,
            t.norm,
            0.0 if o.clip_norm is None else o.clip_norm,
            1.0 - o.beta1,
            o.beta2,
            1.0 - o.beta2,
            o.eps,
            1.0 - o.ema_decay,
            o.low,
            o.high,
            CLIP=o.clip_norm is not None,
            SKIP_NONFINITE=o.skip_nonfinite,
            HAS_EMA=t.ema_params is not None,
            PARAM_COPY=t.param_copies is not None,
            EMA_COPY=t.ema_copies is not None,
            CLAMPS=any(t.clamped),
            ALIGNED=aligned,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )


def _table(t: AdamwEmaTensors, sizes: Sequence[int]) -> tuple[Tensor, bool]:
    """int64 [ROWS, tensors], and whether all its addresses are multiples of 16 bytes."""
    groups = (t.params, t.grads, t.exp_avgs, t.exp_avg_sqs, t.ema_params, t.param_copies, t.ema_copies)
    rows = [[0] * len(sizes) if group is None else [tensor.data_ptr() for tensor in group] for group in groups]
    assert len(rows) == ROWS - 1
    return torch.tensor([*rows, sizes], dtype=torch.int64), all(map(_aligned, rows))


_FLOATS = ("clip_norm", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "one_minus_ema", "low", "high")
_POINTERS = {"table_ptr": "*i64", "owner_ptr": "*i32", "first_ptr": "*i32", "tensors": "i32"}


def _step_case(name: str, *, copies: bool, aligned: bool) -> AheadCase:
    return AheadCase(
        name=name,
        kernel=_adamw_ema_kernel,
        signature={
            **_POINTERS,
            "constants_ptr": "*fp32",
            "grad_scale": "fp32",
            "norm_ptr": "*fp32",
            **dict.fromkeys(_FLOATS, "fp32"),
        },
        constexprs={
            "grad_scale_ptr": None,
            "CLIP": True,
            "SKIP_NONFINITE": True,
            "HAS_EMA": True,
            "PARAM_COPY": copies,
            "EMA_COPY": copies,
            "CLAMPS": True,
            "ALIGNED": aligned,
            "BLOCK": BLOCK,
        },
        num_warps=NUM_WARPS,
    )


COMPILE_AHEAD = [
    _step_case("step", copies=False, aligned=True),
    _step_case("step/copies", copies=True, aligned=True),
    _step_case("step/unaligned", copies=False, aligned=False),
    AheadCase(
        name="squares",
        kernel=_squares_kernel,
        signature={**_POINTERS, "partial_ptr": "*fp32"},
        constexprs={"ALIGNED": True, "BLOCK": BLOCK},
    ),
    AheadCase(
        name="norm",
        kernel=_norm_kernel,
        signature={"partial_ptr": "*fp32", "norm_ptr": "*fp32", "partials": "i32"},
        constexprs={"BLOCK": 1024},
    ),
]
