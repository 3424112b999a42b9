"""Soft-target distillation between two similarity matrices in Triton; the matrices never reach memory as a whole.

    s = student_scale <a_i, b_j>,  t = teacher_scale <a'_i, b'_j>     for every pair of views
    statistics: the state (see `distill_state`) of every row and of every column, from one computation of s and t
    gradient:   g_ij = row_weight (q_r - p_r) + column_weight (q_c - p_c),  q, p the softmaxes of s, t over columns (r)
                and rows (c);  grad_a = g b,  grad_b = g^T a

A statistics program goes through a stripe of columns: it carries the states of its rows, and stores the states of each
tile's columns, to be merged over the row tiles. The gradient matrix is written in chunks that stay in L2 and multiplied
by the library. No atomics: the same result every time.

Shapes: a [Va, B, D], b [Vb, G, D], a' [Va or 1, B, D'], b' [Vb or 1, G, D'] in fp32, bf16 or fp16; states fp32
[5, Va, B, Vb] and [5, Va, Vb, G]; gradients fp32. Products accumulate in fp32 (fp32 operands: three TF32 products, or
one where torch.set_float32_matmul_precision allows it); chunks of g are kept in a's dtype, fp16 ones times 2^14.
Workspace: at most STATE_BYTES, then CHUNK_BYTES (or the smallest piece, if that is larger).

Checked in Triton's interpreter and compiled for sm_80/sm_90/sm_100; not yet run on hardware.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos_kernels import distill_state, triton_support
from cosmos_kernels.infonce_parts import dot_products
from cosmos_kernels.products import add_product
from cosmos_kernels.triton_support import AheadCase

MAX_BLOCK_M = 64  # rows of a tile
MAX_BLOCK_N = 128  # its columns, a quarter with fp32 features: larger tiles spill
MIN_PROGRAMS = 512  # below this many row tiles, columns are split: a few programs for each of some 130 processors
STATE_BYTES = 64 << 20
CHUNK_BYTES = 32 << 20
CHUNK_ROWS = 2048
FP16_FACTOR = 2.0**14  # |g| <= 2 stays below 65504, and entries around 1 / 64k stay normal numbers


@triton.jit
def _statistics_kernel(
    a_ptr,
    b_ptr,
    teacher_a_ptr,
    teacher_b_ptr,
    scale_ptr,
    teacher_scale_ptr,
    row_ptr,  # [splits, 5, views of a, rows, views of b]
    column_ptr,  # [row tiles, 5, views of a, views of b, G]
    rows,
    stride_a,
    stride_teacher_a,
    stride_teacher_b,
    column_views,
    G,
    span,
    D,
    TEACHER_D,
    EVEN_D: tl.constexpr,
    TEACHER_EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    TEACHER_UPCAST: tl.constexpr,
):
    pair = tl.program_id(2)
    a_view = pair // column_views
    b_view = (pair % column_views).to(tl.int64)
    b_ptr += b_view * G * D
    teacher_b_ptr += b_view * stride_teacher_b
    scale = tl.load(scale_ptr)
    teacher_scale = tl.load(teacher_scale_ptr)

    first = tl.program_id(1) * span
    last = tl.minimum(first + span, G)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    # Past the ragged end the last row or column is repeated, and masked afterwards.
    clamped = tl.minimum(offs_m, rows - 1).to(tl.int64)
    a_rows = a_ptr + a_view.to(tl.int64) * stride_a + clamped * D
    teacher_a_rows = teacher_a_ptr + a_view.to(tl.int64) * stride_teacher_a + clamped * TEACHER_D
    pairs = tl.num_programs(2)
    column_ptr += (tl.program_id(0).to(tl.int64) * 5 * pairs + pair) * G
    column_stride = pairs.to(tl.int64) * G

    # Peaks begin finite, so that the first step multiplies zeros by a number.
    peak = tl.full((BLOCK_M,), -1e38, tl.float32)
    teacher_peak = tl.full((BLOCK_M,), -1e38, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    teacher_total = tl.zeros((BLOCK_M,), tl.float32)
    expected = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(first, last, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < last
        valid = mask_m[:, None] & mask_n[None, :]
        clamped_n = tl.minimum(offs_n, G - 1).to(tl.int64)
        s = dot_products(a_rows, b_ptr + clamped_n * D, D, BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, PRECISION, UPCAST)
        t = dot_products(
            teacher_a_rows, teacher_b_ptr + clamped_n * TEACHER_D, TEACHER_D, BLOCK_M, BLOCK_N, BLOCK_D, TEACHER_EVEN_D,
            PRECISION, TEACHER_UPCAST,
        )  # fmt: skip
        s = tl.where(valid, s * scale, -float("inf"))
        t = tl.where(valid, t * teacher_scale, -float("inf"))

        new_peak = tl.maximum(peak, tl.max(s, 1))
        new_teacher_peak = tl.maximum(teacher_peak, tl.max(t, 1))
        shift = peak - new_peak
        decay = tl.exp(teacher_peak - new_teacher_peak)
        shifted = s - new_peak[:, None]
        weights = tl.exp(t - new_teacher_peak[:, None])
        expected = decay * (expected + shift * teacher_total) + tl.sum(tl.where(valid, weights * shifted, 0.0), 1)
        total = total * tl.exp(shift) + tl.sum(tl.exp(shifted), 1)
        teacher_total = teacher_total * decay + tl.sum(weights, 1)
        peak = new_peak
        teacher_peak = new_teacher_peak

        out_ptr = column_ptr + offs_n
        column_peak = tl.maximum(tl.max(s, 0), -1e38)
        tl.store(out_ptr, column_peak, mask=mask_n)
        shifted = s - column_peak[None, :]
        tl.store(out_ptr + column_stride, tl.sum(tl.exp(shifted), 0), mask=mask_n)
        teacher_column_peak = tl.maximum(tl.max(t, 0), -1e38)
        tl.store(out_ptr + 2 * column_stride, teacher_column_peak, mask=mask_n)
        weights = tl.exp(t - teacher_column_peak[None, :])
        tl.store(out_ptr + 3 * column_stride, tl.sum(weights, 0), mask=mask_n)
        tl.store(out_ptr + 4 * column_stride, tl.sum(tl.where(valid, weights * shifted, 0.0), 0), mask=mask_n)

    row_stride = pairs.to(tl.int64) * rows
    out_ptr = row_ptr + tl.program_id(1) * 5 * row_stride
    out_ptr += (a_view.to(tl.int64) * rows + offs_m) * column_views + b_view
    tl.store(out_ptr, peak, mask=mask_m)
    tl.store(out_ptr + row_stride, total, mask=mask_m)
    tl.store(out_ptr + 2 * row_stride, teacher_peak, mask=mask_m)
    tl.store(out_ptr + 3 * row_stride, teacher_total, mask=mask_m)
    tl.store(out_ptr + 4 * row_stride, expected, mask=mask_m)


@triton.jit
def _gradient_kernel(
    a_ptr,
    b_ptr,
    teacher_a_ptr,
    teacher_b_ptr,
    scale_ptr,
    teacher_scale_ptr,
    row_ptr,  # states [5, Va, B, Vb], from the chunk's first view and row of a and first view of b on
    column_ptr,  # states [5, Va, Vb, G], from the chunk's first view of a, first view and row of b on
    grad_ptr,  # [views of a, rows, views of b, columns] of the chunk
    rows,
    columns,
    chunk_column_views,
    stride_a,
    stride_b,
    stride_teacher_a,
    stride_teacher_b,
    B,
    column_views,
    G,
    row_stride,
    column_stride,
    row_weight,
    column_weight,
    D,
    TEACHER_D,
    EVEN_D: tl.constexpr,
    TEACHER_EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    TEACHER_UPCAST: tl.constexpr,
):
    a_view = (tl.program_id(2) // chunk_column_views).to(tl.int64)
    b_view = (tl.program_id(2) % chunk_column_views).to(tl.int64)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < rows
    mask_n = offs_n < columns
    clamped_m = tl.minimum(offs_m, rows - 1).to(tl.int64)
    clamped_n = tl.minimum(offs_n, columns - 1).to(tl.int64)
    a_rows = a_ptr + a_view * stride_a + clamped_m * D
    b_rows = b_ptr + b_view * stride_b + clamped_n * D
    s = dot_products(a_rows, b_rows, D, BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, PRECISION, UPCAST)
    a_rows = teacher_a_ptr + a_view * stride_teacher_a + clamped_m * TEACHER_D
    b_rows = teacher_b_ptr + b_view * stride_teacher_b + clamped_n * TEACHER_D
    t = dot_products(a_rows, b_rows, TEACHER_D, BLOCK_M, BLOCK_N, BLOCK_D, TEACHER_EVEN_D, PRECISION, TEACHER_UPCAST)
    s *= tl.load(scale_ptr)
    t *= tl.load(teacher_scale_ptr)

    row_ptr += (a_view * B + offs_m) * column_views + b_view
    column_ptr += (a_view * column_views + b_view) * G + offs_n
    row_factor = row_weight / tl.load(row_ptr + row_stride, mask=mask_m, other=1.0)
    column_factor = column_weight / tl.load(column_ptr + column_stride, mask=mask_n, other=1.0)
    grad = tl.exp(s - tl.load(row_ptr, mask=mask_m, other=0.0)[:, None]) * row_factor[:, None]
    grad += tl.exp(s - tl.load(column_ptr, mask=mask_n, other=0.0)[None, :]) * column_factor[None, :]
    row_factor = row_weight / tl.load(row_ptr + 3 * row_stride, mask=mask_m, other=1.0)
    column_factor = column_weight / tl.load(column_ptr + 3 * column_stride, mask=mask_n, other=1.0)
    grad -= tl.exp(t - tl.load(row_ptr + 2 * row_stride, mask=mask_m, other=0.0)[:, None]) * row_factor[:, None]
    grad -= (
        tl.exp(t - tl.load(column_ptr + 2 * column_stride, mask=mask_n, other=0.0)[None, :]) * column_factor[None, :]
    )

    out_ptr = grad_ptr + ((a_view * rows + offs_m[:, None]) * chunk_column_views + b_view) * columns + offs_n[None, :]
    tl.store(out_ptr, grad.to(grad_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def statistics(
    student_a_VBD: Tensor,
    student_b_VGD: Tensor,
    teacher_a_VBD: Tensor,
    teacher_b_VGD: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """States of every row [5, Va, B, Vb] and of every column [5, Va, Vb, G]."""
    a, b, teacher_a, teacher_b = _contiguous(student_a_VBD, student_b_VGD, teacher_a_VBD, teacher_b_VGD)
    scales = student_scale.float(), teacher_scale.float()
    (row_views, batch, _), (column_views, total, _) = a.shape, b.shape
    row_states = a.new_empty((distill_state.SIZE, row_views, batch, column_views), dtype=torch.float32)
    column_states = a.new_empty((distill_state.SIZE, row_views, column_views, total), dtype=torch.float32)
    options = _options(a, teacher_a, batch, total)
    block_m, block_n = options["BLOCK_M"], options["BLOCK_N"]
    tiles, blocks = triton.cdiv(batch, block_m), triton.cdiv(total, block_n)
    bytes_a_tile = 4 * distill_state.SIZE * column_views * total
    for views, tile_range in _spans(row_views, tiles, STATE_BYTES // bytes_a_tile):
        rows = slice(tile_range.start * block_m, min(tile_range.stop * block_m, batch))
        here, height = views.stop - views.start, rows.stop - rows.start
        height_tiles = tile_range.stop - tile_range.start
        grid_without_splits = height_tiles * here * column_views
        blocks_each = triton.cdiv(blocks, min(blocks, triton.cdiv(MIN_PROGRAMS, grid_without_splits)))
        splits = triton.cdiv(blocks, blocks_each)
        row_pieces = row_states.new_empty(splits, distill_state.SIZE, here, height, column_views)
        column_pieces = row_states.new_empty(height_tiles, distill_state.SIZE, here, column_views, total)
        teacher_views = views if teacher_a.shape[0] > 1 else slice(0, 1)
        with triton_support.launch_device(a):
            _statistics_kernel[(height_tiles, splits, here * column_views)](
                a[views, rows],
                b,
                teacher_a[teacher_views, rows],
                teacher_b,
                *scales,
                row_pieces,
                column_pieces,
                height,
                a.stride(0),
                _view_stride(teacher_a),
                _view_stride(teacher_b),
                column_views,
                total,
                blocks_each * block_n,
                **options,
            )
        row_states[:, views, rows] = distill_state.merge(row_pieces)
        found = distill_state.merge(column_pieces)
        if tile_range.start > 0:
            found = distill_state.merge(torch.stack((column_states[:, views], found)))
        column_states[:, views] = found
    return row_states, column_states


def feature_gradients(
    student_a_VBD: Tensor,
    student_b_VGD: Tensor,
    teacher_a_VBD: Tensor,
    teacher_b_VGD: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
    row_states: Tensor,
    column_states: Tensor,
    row_weight: float,
    column_weight: float,
    want_a: bool,
    want_b: bool,
) -> tuple[Tensor, Tensor]:
    """g b [Va, B, D] and g^T a [Vb, G, D] in fp32; a side that is not wanted is an empty tensor. Weights at most 1."""
    a, b, *teacher = _contiguous(student_a_VBD, student_b_VGD, teacher_a_VBD, teacher_b_VGD)
    inputs = (a, b, *teacher, student_scale.float(), teacher_scale.float())
    states = _contiguous(row_states, column_states)
    (row_views, batch, dim), (column_views, total, _) = a.shape, b.shape
    grad_a = torch.zeros_like(a, dtype=torch.float32) if want_a else a.new_empty(0, dtype=torch.float32)
    grad_b = torch.zeros_like(b, dtype=torch.float32) if want_b else b.new_empty(0, dtype=torch.float32)
    dtype = torch.float32 if triton_support.upcast(a.dtype) else a.dtype
    factor = FP16_FACTOR if dtype == torch.float16 else 1.0
    chunk_rows = min(CHUNK_ROWS, row_views * batch)
    chunk_columns = CHUNK_BYTES // (dtype.itemsize * chunk_rows)
    for views, rows in _spans(row_views, batch, chunk_rows):
        part_a = a[views, rows].reshape(-1, dim)
        for other_views, columns in _spans(column_views, total, chunk_columns):
            part_b = b[other_views, columns].reshape(-1, dim)
            chunk = a.new_empty((part_a.shape[0], part_b.shape[0]), dtype=dtype)
            weights = factor * row_weight, factor * column_weight
            _write_chunk(chunk, inputs, states, (views, rows), (other_views, columns), weights)
            if want_a:
                out = grad_a[views, rows].view(-1, dim)
                add_product(out, chunk, part_b.to(dtype), alpha=1 / factor, overwrite=False)
            if want_b:
                out = grad_b[other_views, columns].view(-1, dim)
                add_product(out, chunk.T, part_a.to(dtype), alpha=1 / factor, overwrite=False)
    return grad_a, grad_b


def _write_chunk(
    chunk: Tensor,
    inputs: tuple[Tensor, ...],
    states: tuple[Tensor, ...],
    row_span: tuple[slice, slice],
    column_span: tuple[slice, slice],
    weights: tuple[float, float],
) -> None:
    """Entries g of the spans' rows and columns, times the factor in `weights`, into the chunk."""
    a, b, teacher_a, teacher_b, *scales = inputs
    (views, rows), (other_views, columns) = row_span, column_span
    batch, total = a.shape[1], b.shape[1]
    height, width = rows.stop - rows.start, columns.stop - columns.start
    here, others = views.stop - views.start, other_views.stop - other_views.start
    options = _options(a, teacher_a, height, width)
    grid = (triton.cdiv(width, options["BLOCK_N"]), triton.cdiv(height, options["BLOCK_M"]), here * others)
    with triton_support.launch_device(a):
        _gradient_kernel[grid](
            a[views, rows],
            b[other_views, columns],
            teacher_a[views if teacher_a.shape[0] > 1 else slice(0, 1), rows],
            teacher_b[other_views if teacher_b.shape[0] > 1 else slice(0, 1), columns],
            *scales,
            states[0][:, views, rows, other_views],
            states[1][:, views, other_views, columns],
            chunk,
            height,
            width,
            others,
            a.stride(0),
            b.stride(0),
            _view_stride(teacher_a),
            _view_stride(teacher_b),
            batch,
            b.shape[0],
            total,
            states[0].stride(0),
            states[1].stride(0),
            *weights,
            **options,
        )


def _spans(views: int, size: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Cover [views, size] with spans of at most `limit` items: several whole views, or a part of one."""
    step = min(size, max(1, limit))
    view_step = max(1, limit // size)
    for first_view in range(0, views, view_step):
        for first in range(0, size, step):
            yield slice(first_view, min(first_view + view_step, views)), slice(first, min(first + step, size))


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _view_stride(features: Tensor) -> int:
    """Elements between views; 0 where one view serves all."""
    return features.stride(0) if features.shape[0] > 1 else 0


def _options(a: Tensor, teacher_a: Tensor, rows: int, columns: int) -> dict[str, Any]:
    """Constants of a launch."""
    wide = torch.float32 in (a.dtype, teacher_a.dtype)
    block_m = min(MAX_BLOCK_M, max(16, triton.next_power_of_2(rows)))
    block_n = min(MAX_BLOCK_N // 4 if wide else MAX_BLOCK_N, max(16, triton.next_power_of_2(columns)))
    block_d = 32 if wide else 64
    exact = torch.get_float32_matmul_precision() == "highest"
    return {
        "D": a.shape[2],
        "TEACHER_D": teacher_a.shape[2],
        "EVEN_D": a.shape[2] % block_d == 0,
        "TEACHER_EVEN_D": teacher_a.shape[2] % block_d == 0,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "PRECISION": "tf32x3" if exact else "tf32",
        "UPCAST": triton_support.upcast(a.dtype),
        "TEACHER_UPCAST": triton_support.upcast(teacher_a.dtype),
        "num_warps": 8 if block_m * block_n >= 1 << 13 else 4,
        "num_stages": 3,
    }


def _ahead(name: str, kernel: triton.JITFunction, dtype: str, others: dict[str, str]) -> AheadCase:
    """A launch for 512 channels on both sides and many rows and columns."""
    features = torch.empty(1, 1, 512, dtype={"fp16": torch.float16, "fp32": torch.float32}[dtype])
    constexprs = _options(features, features, CHUNK_ROWS, CHUNK_ROWS)
    warps, stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")
    others |= dict.fromkeys(("D", "TEACHER_D"), "i32")
    del constexprs["D"], constexprs["TEACHER_D"]
    pointers = dict.fromkeys(("a_ptr", "b_ptr", "teacher_a_ptr", "teacher_b_ptr"), f"*{dtype}")
    pointers |= dict.fromkeys(("scale_ptr", "teacher_scale_ptr", "row_ptr", "column_ptr"), "*fp32")
    sizes = tuple(key for key, kind in others.items() if kind == "i32" and "views" not in key)
    return AheadCase(
        name=f"{name}/D512/{dtype}",
        kernel=kernel,
        signature={**pointers, **others},
        constexprs=constexprs,
        num_warps=warps,
        num_stages=stages,
        divisible_by_16=sizes,
    )


_STRIDES = ("stride_a", "stride_teacher_a", "stride_teacher_b", "rows", "column_views", "G")
_CHUNK = ("stride_b", "columns", "chunk_column_views", "B", "row_stride", "column_stride")
_WEIGHTS = {"row_weight": "fp32", "column_weight": "fp32"}

COMPILE_AHEAD = [
    case
    for dtype in ("fp16", "fp32")
    for case in (
        _ahead("statistics", _statistics_kernel, dtype, dict.fromkeys((*_STRIDES, "span"), "i32")),
        _ahead(
            "gradient",
            _gradient_kernel,
            dtype,
            {"grad_ptr": f"*{dtype}", **dict.fromkeys((*_STRIDES, *_CHUNK), "i32"), **_WEIGHTS},
        ),
    )
]
