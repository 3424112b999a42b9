"""Launchers of the optimizer of csrc/, on the CPU and with CUDA: the gradient norm, and fused AdamW + EMA.

They take tensors that the caller has checked: fp32 (copies bf16), contiguous, equal lengths and sizes, one device. A
call costs a few microseconds plus 1 us a tensor; on CUDA nothing waits for the device.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import native
from .adamw_ema_call import AdamwEmaOptions, AdamwEmaTensors

_POINTER_LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "ema_params", "param_copies", "ema_copies")


class _Options(ctypes.Structure):
    """CosmosAdamwEmaOptions."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "ema_decay", "grad_scale")),
        *((name, ctypes.c_double) for name in ("clip_norm", "low", "high")),
        ("skip_nonfinite", ctypes.c_int32),
    )


class _Tensors(ctypes.Structure):
    """CosmosAdamwEmaTensors: arrays with one entry a tensor."""

    _fields_ = (
        ("tensors", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _POINTER_LISTS),
        *((name, ctypes.c_void_p) for name in ("sizes", "steps", "weight_decays", "clamped")),
    )


_CPU_ARGUMENTS = (ctypes.POINTER(_Tensors), ctypes.POINTER(_Options), ctypes.c_int32)
_CUDA_ARGUMENTS = (ctypes.POINTER(_Tensors), ctypes.POINTER(_Options), *[ctypes.c_void_p] * 3)
_SUM_ARGUMENTS = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.POINTER(ctypes.c_double))
_PARTIALS_ARGUMENTS = (ctypes.c_void_p, ctypes.c_int64)
_NORM_ARGUMENTS = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 3)


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _sizes(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (ctypes.c_int64 * len(tensors))(*[tensor.numel() for tensor in tensors])


def _tables(t: AdamwEmaTensors) -> tuple[_Tensors, list[ctypes.Array | None]]:
    """The struct of tables, and the tables: they must live until the call returns."""
    groups = [getattr(t, name) for name in _POINTER_LISTS]
    count = len(t.params)
    tables: list[ctypes.Array | None] = [None if group is None else _pointers(group) for group in groups]
    tables += [_sizes(t.params), (ctypes.c_int64 * count)(*t.steps), (ctypes.c_double * count)(*t.weight_decays)]
    tables.append((ctypes.c_uint8 * count)(*t.clamped))
    return _Tensors(count, *(None if table is None else ctypes.addressof(table) for table in tables)), tables


def _options(o: AdamwEmaOptions, grad_scale: float, clip_norm: float | None) -> _Options:
    clip = -1.0 if clip_norm is None else clip_norm
    return _Options(o.lr, o.beta1, o.beta2, o.eps, o.ema_decay, grad_scale, clip, o.low, o.high, int(o.skip_nonfinite))


def adamw_ema_cpu_(tensors: AdamwEmaTensors, options: AdamwEmaOptions) -> None:
    """csrc/adamw_ema_cpu.cpp over CPU tensors, in place; torch's number of threads."""
    scale = options.grad_scale
    if tensors.grad_scale is not None:
        scale *= float(tensors.grad_scale)
    if tensors.norm is not None:
        norm = float(tensors.norm)
        if options.skip_nonfinite and not math.isfinite(norm):
            return
        if options.clip_norm is not None:
            factor = options.clip_norm / (abs(scale) * norm + 1e-6)
            scale = scale if factor >= 1.0 else scale * factor  # a NaN among the gradients makes all of them NaN
    struct, keep = _tables(tensors)
    run = native.function("cpu", "cosmos_adamw_ema_cpu", _CPU_ARGUMENTS, ctypes.c_int32)
    status = run(ctypes.byref(struct), ctypes.byref(_options(options, scale, None)), torch.get_num_threads())
    del keep
    if status != 0:
        raise RuntimeError(f"cosmos_adamw_ema_cpu failed with status {status}")


def sum_of_squares_cpu(tensors: Sequence[Tensor]) -> float:
    """Sum of x^2 over all elements of fp32 contiguous CPU tensors; the same bits for any number of threads."""
    result = ctypes.c_double()
    run = native.function("cpu", "cosmos_sum_of_squares_cpu", _SUM_ARGUMENTS, ctypes.c_int32)
    status = run(_pointers(tensors), _sizes(tensors), len(tensors), torch.get_num_threads(), ctypes.byref(result))
    if status != 0:
        raise RuntimeError(f"cosmos_sum_of_squares_cpu failed with status {status}")
    return result.value


def grad_norm_cpu(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm of CPU gradients, 0-dim fp32."""
    return torch.tensor(math.sqrt(sum_of_squares_cpu(grads)), dtype=torch.float32)


def adamw_ema_cuda_(tensors: AdamwEmaTensors, options: AdamwEmaOptions) -> None:
    """csrc/adamw_ema_cuda.cu over tensors of one CUDA device, in place, on its current stream."""
    if not tensors.params:
        return
    run = native.function("cuda", "cosmos_adamw_ema_cuda", _CUDA_ARGUMENTS, ctypes.c_int32)
    struct, keep = _tables(tensors)
    packed = _options(options, options.grad_scale, options.clip_norm)
    scale, norm = (None if x is None else x.data_ptr() for x in (tensors.grad_scale, tensors.norm))
    native.run_on_stream(run, tensors.params[0], ctypes.byref(struct), ctypes.byref(packed), scale, norm)
    del keep


def grad_norm_cuda(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm of gradients of one CUDA device, 0-dim fp32 there; csrc/grad_norm_cuda.cu. Never read by the host."""
    count = native.function("cuda", "cosmos_grad_norm_cuda_partials", _PARTIALS_ARGUMENTS, ctypes.c_int64)
    run = native.function("cuda", "cosmos_grad_norm_cuda", _NORM_ARGUMENTS, ctypes.c_int32)
    pointers, sizes = _pointers(grads), _sizes(grads)
    norm = grads[0].new_empty(())
    partials = grads[0].new_empty(count(sizes, len(grads)), dtype=torch.float64)
    native.run_on_stream(run, norm, pointers, sizes, len(grads), partials.data_ptr(), norm.data_ptr())
    return norm
