"""CUDA backend of the multi-view contrastive loss: Triton's forward, and the backward of csrc/infonce_backward_cuda.cu.

The backward writes dL/ds for a rectangle of rows and columns into a workspace of at most 32 MiB, which stays in the L2
cache, and multiplies it from there by both sides: three matrix products, two where only the rows want a gradient. No
matrix of the size of the logits reaches device memory. Tensor cores with fp16 or bf16 operands and fp32 sums;
deterministic. Two sets of kernels: mma.sync for compute capability 8.0 and later, and wgmma for 9.0 (`PATH`).

Both checked on a CPU in the emulation of csrc/emulation (every element of both gradients against fp64) and compiled
without spills for sm_80 and sm_90a; not yet run on hardware.

Axes: Va, Vb views, B rows, G columns, D embedding.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native

DTYPES = {torch.float16: 0, torch.bfloat16: 1}
ALIGNMENT = 8  # elements: rows of features begin at multiples of 16 bytes


class _Shape(ctypes.Structure):
    """CosmosInfonceShape."""

    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("row_views", "rows", "column_views", "columns", "dim", "offset")
    )


class _Tensors(ctypes.Structure):
    """CosmosInfonceTensors."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("rows", "columns", "scale", "row_lse", "col_lse", "grad_rows", "grad_columns")
    )


MMA_SYNC, WGMMA = 0, 1
PATH = MMA_SYNC  # WGMMA: compute capability 9.0 alone; not the default before it has been measured on such a device

_WORKSPACE_ARGUMENTS = (ctypes.POINTER(_Shape),)
_BACKWARD_ARGUMENTS = (
    ctypes.POINTER(_Shape),
    ctypes.POINTER(_Tensors),
    ctypes.c_int32,
    ctypes.c_int32,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_void_p,
)


def why_unsupported(rows_VBD: Tensor, columns_VGD: Tensor, *_: Tensor) -> str | None:
    """None where the kernels take these features, else the reason."""
    for tensor in (rows_VBD, columns_VGD):
        if tensor.dtype not in DTYPES:
            return f"features in {tensor.dtype}: its tensor-core kernels take float16 or bfloat16"
        if not tensor.is_cuda:
            return f"features on {tensor.device}, it needs CUDA tensors"
    return None


def log_sum_exps(rows_VBD: Tensor, columns_VGD: Tensor, scale: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """The forward stage: Triton's."""
    from . import infonce_triton  # only now: the backward does without Triton

    return infonce_triton.log_sum_exps(rows_VBD, columns_VGD, scale, offset)


def feature_gradients(
    rows_VBD: Tensor,
    columns_VGD: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    offset: int,
    want_columns: bool,
    *,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums of (exp(s - row_lse) + exp(s - col_lse) - 2 [j = offset + i]) times the other side, s = scale <x_i, y_j>.

    Args:
        rows_VBD, columns_VGD: [Va, B, D] and [Vb, G, D], fp16 or bf16, the same for both.
        scale: scalar tensor on their device.
        row_lse, col_lse: [Va, B, Vb] and [Va, Vb, G], fp32, natural logarithms.
        offset: the column that belongs to row 0; offset + B <= G.
        want_columns: whether the columns' gradient is wanted.
        workspace_bytes: of device memory to work in (at least 64 KiB); the library's choice where None.

    Returns:
        fp32 [Va, B, D], and fp32 [Vb, G, D], empty where not wanted.

    Raises:
        RuntimeError: the library is missing, or CUDA reports an error.
    """
    (row_views, batch, dim), (column_views, total, _) = rows_VBD.shape, columns_VGD.shape
    rows_VBD, columns_VGD = _aligned(rows_VBD), _aligned(columns_VGD)
    shape = _Shape(row_views, batch, column_views, total, rows_VBD.shape[2], offset)
    grad_rows = torch.empty_like(rows_VBD, dtype=torch.float32)
    grad_columns = torch.empty_like(columns_VGD, dtype=torch.float32) if want_columns else None
    if workspace_bytes is None:
        query = native.function("cuda", "cosmos_infonce_backward_workspace", _WORKSPACE_ARGUMENTS, ctypes.c_int64)
        workspace_bytes = max(query(ctypes.byref(shape)), 0)
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=rows_VBD.device)
    inputs = [tensor.detach().float().contiguous() for tensor in (scale, row_lse, col_lse)]
    outputs = [grad_rows.data_ptr(), None if grad_columns is None else grad_columns.data_ptr()]
    tensors = _Tensors(*(tensor.data_ptr() for tensor in (rows_VBD, columns_VGD, *inputs)), *outputs)
    native.run_on_stream(
        native.function("cuda", "cosmos_infonce_backward", _BACKWARD_ARGUMENTS, ctypes.c_int32),
        rows_VBD,
        ctypes.byref(shape),
        ctypes.byref(tensors),
        DTYPES[rows_VBD.dtype],
        PATH,
        workspace.data_ptr(),
        workspace.numel(),
    )
    no_columns = rows_VBD.new_empty(0, dtype=torch.float32)
    return grad_rows[..., :dim], no_columns if grad_columns is None else grad_columns[..., :dim]


def _aligned(features_VBD: Tensor) -> Tensor:
    """Contiguous, and padded with zero features where D is no multiple of 8: they change no similarity."""
    missing = -features_VBD.shape[2] % ALIGNMENT
    features_VBD = features_VBD.detach()
    features_VBD = F.pad(features_VBD, (0, missing)) if missing else features_VBD.contiguous()
    return features_VBD if features_VBD.data_ptr() % 16 == 0 else features_VBD.clone()
