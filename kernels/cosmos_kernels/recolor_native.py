"""Launcher of csrc/recolor_cpu.cpp: jitter, grey, blur, solarise and flip of uint8 crops, in place."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import native

_DTYPES = {
    "order": torch.int64,
    "amount": torch.float32,
    "gray": torch.bool,
    "blur_radius": torch.float32,
    "solarize_threshold": torch.float32,
    "flip": torch.bool,
}


class _Recolor(ctypes.Structure):
    """CosmosRecolor."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _DTYPES),
        *((name, ctypes.c_int64) for name in ("crops", "height", "width")),
    )


_ARGUMENTS = (ctypes.POINTER(_Recolor), ctypes.c_void_p, ctypes.c_int32)


def recolor_(pixels: Tensor, *columns: Tensor) -> None:
    """uint8 [N, 3, H, W], contiguous, on the CPU; torch's number of threads.

    columns: order [N, 4], amount [N, 4], gray, blur_radius, solarize_threshold, flip [N] of ColorNumbers, in any dtype.
    """
    table = [column.to(dtype).contiguous() for column, dtype in zip(columns, _DTYPES.values(), strict=True)]
    crops, _, height, width = pixels.shape
    struct = _Recolor(*(column.data_ptr() for column in table), crops, height, width)
    run = native.function("cpu", "cosmos_recolor_cpu", _ARGUMENTS, ctypes.c_int32)
    status = run(ctypes.byref(struct), pixels.data_ptr(), torch.get_num_threads())
    if status != 0:
        raise RuntimeError(f"cosmos_recolor_cpu failed with status {status}")
