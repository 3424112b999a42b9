"""Launchers of the fused AdamW + EMA of csrc/, CPU and CUDA, and of the CPU's sum of squares.

Launchers take tensors that the caller has checked: fp32, contiguous, equal lengths and sizes, on the right device. A
call costs a few microseconds plus 0.1 us a tensor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import native


@dataclass(frozen=True, kw_only=True)
class AdamwEmaOptions:
    """Hyper-parameters of one fused step; `step` is 1 for the first update."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    ema_decay: float
    step: int


class _Options(ctypes.Structure):
    """CosmosAdamwEmaOptions."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "ema_decay")),
        ("grad_scale", ctypes.c_double),
        ("step", ctypes.c_int64),
    )


class _Tensors(ctypes.Structure):
    """CosmosAdamwEmaTensors: arrays of pointers, one entry a tensor."""

    _fields_ = (
        ("tensors", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("param", "grad", "exp_avg", "exp_avg_sq", "ema", "sizes")),
    )


_CPU_ARGUMENTS = (ctypes.POINTER(_Tensors), ctypes.POINTER(_Options), ctypes.c_int32)
_CUDA_ARGUMENTS = (ctypes.POINTER(_Tensors), ctypes.POINTER(_Options), ctypes.c_void_p, ctypes.c_void_p)
_SUM_ARGUMENTS = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.POINTER(ctypes.c_double))


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _sizes(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (ctypes.c_int64 * len(tensors))(*[tensor.numel() for tensor in tensors])


def _adamw_ema_tables(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ema_params: Sequence[Tensor] | None,
) -> tuple[_Tensors, list[ctypes.Array]]:
    """The struct of tables, and the tables: they must live until the call returns."""
    tables = [_pointers(group) for group in (params, grads, exp_avgs, exp_avg_sqs)]
    ema = None if ema_params is None else _pointers(ema_params)
    sizes = _sizes(params)
    address = ctypes.addressof
    struct = _Tensors(
        len(params), *(address(table) for table in tables), None if ema is None else address(ema), address(sizes)
    )
    return struct, [*tables, sizes] if ema is None else [*tables, ema, sizes]


def _adamw_ema_options(options: AdamwEmaOptions, grad_scale: float) -> _Options:
    o = options
    return _Options(o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.ema_decay, grad_scale, o.step)


def adamw_ema_cpu_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ema_params: Sequence[Tensor] | None,
    options: AdamwEmaOptions,
    grad_scale: float,
) -> None:
    """csrc/adamw_ema_cpu.cpp over lists of fp32 contiguous CPU tensors, in place; torch's number of threads."""
    struct, keep = _adamw_ema_tables(params, grads, exp_avgs, exp_avg_sqs, ema_params)
    status = native.function("cpu", "cosmos_adamw_ema_cpu", _CPU_ARGUMENTS, ctypes.c_int32)(
        ctypes.byref(struct), ctypes.byref(_adamw_ema_options(options, grad_scale)), torch.get_num_threads()
    )
    del keep
    if status != 0:
        raise RuntimeError(f"cosmos_adamw_ema_cpu failed with status {status}")


def sum_of_squares_cpu(tensors: Sequence[Tensor]) -> float:
    """Sum of x^2 over all elements of fp32 contiguous CPU tensors; the same bits for any number of threads."""
    result = ctypes.c_double()
    status = native.function("cpu", "cosmos_sum_of_squares_cpu", _SUM_ARGUMENTS, ctypes.c_int32)(
        _pointers(tensors), _sizes(tensors), len(tensors), torch.get_num_threads(), ctypes.byref(result)
    )
    if status != 0:
        raise RuntimeError(f"cosmos_sum_of_squares_cpu failed with status {status}")
    return result.value


def adamw_ema_cuda_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ema_params: Sequence[Tensor] | None,
    options: AdamwEmaOptions,
    grad_scale: float,
    grad_scale_device: Tensor | None,
) -> None:
    """csrc/adamw_ema_cuda.cu over lists of fp32 contiguous tensors of one CUDA device, in place, on its current stream.

    grad_scale_device: one fp32 on that device that multiplies grad_scale as well; never read by the host.
    """
    if not params:
        return
    step = native.function("cuda", "cosmos_adamw_ema_cuda", _CUDA_ARGUMENTS, ctypes.c_int32)
    struct, keep = _adamw_ema_tables(params, grads, exp_avgs, exp_avg_sqs, ema_params)
    device = params[0].device
    with torch.cuda.device(device):
        status = step(
            ctypes.byref(struct),
            ctypes.byref(_adamw_ema_options(options, grad_scale)),
            None if grad_scale_device is None else grad_scale_device.data_ptr(),
            torch.cuda.current_stream(device).cuda_stream,
        )
    del keep
    if status != 0:
        raise RuntimeError(f"cosmos_adamw_ema_cuda: {native.cuda_error(status)}")
