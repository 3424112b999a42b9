"""The two stages of the optimizer step as torch custom ops, which can stand in a compiled step, and their backends.

The ops are opaque to the compiler: the backend is chosen inside, at run time. Arguments are those of adamw_ema_, listed
and checked by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import Tensor

from cosmos_fast.ops.adamw_ema_eager import adamw_ema_eager_, grad_norm_eager
from cosmos_fast.ops.backends import Backend, register, stages_for
from cosmos_kernels import adamw_ema_native, native, triton_support
from cosmos_kernels.adamw_ema_call import AdamwEmaOptions, AdamwEmaTensors

MAX_LOG_SCALE = math.log(100.0)


@torch.library.custom_op("cosmos_fast::grad_norm", mutates_args=())
def norm(grads: Sequence[Tensor], backend: str) -> Tensor:
    return stages_for("grad_norm", backend, *grads)(grads)


@norm.register_fake
def _(grads: Sequence[Tensor], backend: str) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


def run_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ema_params: Sequence[Tensor],
    param_copies: Sequence[Tensor],
    ema_copies: Sequence[Tensor],
    grad_scale: Tensor | None,
    norm: Tensor | None,
    steps: Sequence[int],
    weight_decays: Sequence[float],
    clamped: Sequence[int],
    hyper: Sequence[float],
    clip_norm: float | None,
    skip_nonfinite: bool,
    backend: str,
) -> None:
    """Empty lists stand for what is left out. hyper: lr, beta1, beta2, eps, ema_decay, grad_scale."""
    tensors = AdamwEmaTensors(
        params=params,
        grads=grads,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        ema_params=ema_params or None,
        param_copies=param_copies or None,
        ema_copies=ema_copies or None,
        steps=steps,
        weight_decays=weight_decays,
        clamped=clamped,
        grad_scale=grad_scale,
        norm=norm,
    )
    lr, beta1, beta2, eps, ema_decay, factor = hyper
    options = AdamwEmaOptions(
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        ema_decay=ema_decay,
        grad_scale=factor,
        clip_norm=clip_norm,
        low=0.0,
        high=MAX_LOG_SCALE,
        skip_nonfinite=skip_nonfinite,
    )
    state = (*params, *grads, *exp_avgs, *exp_avg_sqs, *ema_params)
    stages_for("adamw_ema", backend, *state)(tensors, options)
    torch.autograd.graph.increment_version([*params, *ema_params])  # a graph that still needs the old values fails


step_ = torch.library.custom_op(
    "cosmos_fast::adamw_ema_",
    run_step_,
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "ema_params", "param_copies", "ema_copies"),
)


@step_.register_fake
def _(*_args: object, **_kwargs: object) -> None:
    """Nothing new is made."""


def _plain_on(device_type: str, *tensors: Tensor) -> str | None:
    """Sets first: a loop over a thousand tensors in Python costs as much as updating a million parameters."""
    for device in {tensor.device for tensor in tensors}:
        if device.type != device_type:
            return f"it runs on {device_type} tensors, one is on {device}"
    for dtype in {tensor.dtype for tensor in tensors}:
        if dtype != torch.float32:
            return f"it takes float32, one tensor is {dtype}"
    if all(map(Tensor.is_contiguous, tensors)):
        return None
    odd = next(tensor for tensor in tensors if not tensor.is_contiguous())
    return f"it takes contiguous tensors, one of shape {tuple(odd.shape)} has strides {odd.stride()}"


def _why_not_native(*tensors: Tensor) -> str | None:
    return _plain_on("cpu", *tensors)


def _why_not_cuda(*tensors: Tensor) -> str | None:
    return _plain_on("cuda", *tensors)


def _why_not_triton(*tensors: Tensor) -> str | None:
    return triton_support.why_not_on(*tensors) or _plain_on(tensors[0].device.type, *tensors)


def _no_native() -> str | None:
    return native.why_missing("cpu")


def _cuda(op: str, run: Callable, summary: str) -> Backend:
    return Backend(op, "cuda", run, summary, native.why_no_gpu, _why_not_cuda)


def _native(op: str, run: Callable, summary: str) -> Backend:
    return Backend(op, "native", run, summary, _no_native, _why_not_native)


def _triton(op: str, function: str, summary: str) -> Backend:
    def load() -> Callable:
        return getattr(import_module("cosmos_kernels.adamw_ema_triton"), function)

    return Backend(op, "triton", None, summary, triton_support.why_missing, _why_not_triton, load=load)


register(
    _cuda("adamw_ema", adamw_ema_native.adamw_ema_cuda_, "csrc, one pass over memory"),
    _triton("adamw_ema", "adamw_ema_", "one launch, one pass over memory"),
    _native("adamw_ema", adamw_ema_native.adamw_ema_cpu_, "csrc, one pass over memory, OpenMP"),
    Backend("adamw_ema", "eager", adamw_ema_eager_, "torch foreach; any device, dtype, layout"),
    _cuda("grad_norm", adamw_ema_native.grad_norm_cuda, "csrc, one read, fixed order"),
    _triton("grad_norm", "grad_norm", "one read, fixed order"),
    _native("grad_norm", adamw_ema_native.grad_norm_cpu, "csrc, one read, any number of threads"),
    Backend("grad_norm", "eager", grad_norm_eager, "torch foreach; any device and dtype"),
)
