"""AdamW and the teacher's exponential moving average in one pass over memory, and the global gradient norm.

    ema <- ema_decay * ema + (1 - ema_decay) * param          (the parameter from BEFORE the step)
    g   <- grad_scale * grad
    exp_avg, exp_avg_sq, param <- AdamW as torch.optim.AdamW  (decoupled weight decay, bias correction)

Backends of `adamw_ema`:
    cuda    csrc/adamw_ema_cuda.cu: 36 B per element, a launch per 48 tensors. Compiled for sm_80 and sm_90a; not yet
            run on hardware.
    native  csrc/adamw_ema_cpu.cpp: 36 B per element, one OpenMP loop over all tensors
    eager   torch's foreach operations: any device, dtype and layout
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cosmos_fast.ops.backends import Backend, register, resolve
from cosmos_kernels import adamw_ema_native, native
from cosmos_kernels.adamw_ema_native import AdamwEmaOptions

TensorLists = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor] | None]


@torch.no_grad()
def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ema_params: Sequence[Tensor] | None,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float,
    grad_scale: float | Tensor = 1.0,
    backend: str = "auto",
) -> None:
    """One optimizer step with the teacher update in front, in place. One call a weight-decay group.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: lists of equal length; entry i of all of them has one shape, dtype and
            device. All tensors of a call lie on one device.
        ema_params: the teacher's, shaped alike; None leaves the average out. It may differ in dtype (eager only).
        step: number of this update, from 1.
        grad_scale: multiplies the gradients (clipping, loss scaling); a 0-dim fp32 tensor is read where it lies, so
            that clipping on a GPU needs no synchronisation.
        backend: "auto", "eager", "native" (CPU) or "cuda".

    Raises:
        ValueError: lists that do not match, or an explicit backend that cannot take them.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs, ema_params)
    _check(lists)
    if step < 1:
        raise ValueError(f"step is {step}; the first update has step 1")
    flat = [tensor for group in lists if group is not None for tensor in group]
    run = resolve("adamw_ema", backend, *flat).backend.run
    options = AdamwEmaOptions(
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, ema_decay=ema_decay, step=step
    )
    if params:
        run(lists, options, grad_scale)


@torch.no_grad()
def grad_norm(grads: Iterable[Tensor], *, backend: str = "auto") -> Tensor:
    """L2 norm over all elements of all gradients: 0-dim fp32 tensor on their device (CPU for an empty list)."""
    grads = list(grads)
    if not grads:
        return torch.zeros(())
    return resolve("grad_norm", backend, *grads).backend.run(grads)


def _check(lists: TensorLists) -> None:
    """Every list as long as params; entry i of every list like params[i]; one device."""
    params = lists[0]
    for name, group in zip(("grads", "exp_avgs", "exp_avg_sqs", "ema_params"), lists[1:], strict=True):
        if group is None and name == "ema_params":
            continue
        assert group is not None
        if len(group) != len(params):
            raise ValueError(f"{name} has {len(group)} tensors, params has {len(params)}")
        for i, (tensor, param) in enumerate(zip(group, params, strict=True)):
            if tensor.shape != param.shape:
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(tensor.shape)}, expected {tuple(param.shape)} as params[{i}]"
                )
            if tensor.device != params[0].device:
                raise ValueError(f"{name}[{i}] is on {tensor.device}, params[0] on {params[0].device}")
            if tensor.dtype != param.dtype and name != "ema_params":
                raise ValueError(f"{name}[{i}] has dtype {tensor.dtype}, expected {param.dtype} as params[{i}]")
    for i, param in enumerate(params):
        if param.device != params[0].device:
            raise ValueError(f"params[{i}] is on {param.device}, params[0] on {params[0].device}")


def _run_eager(lists: TensorLists, options: AdamwEmaOptions, grad_scale: float | Tensor) -> None:
    params, grads, exp_avgs, exp_avg_sqs = (list(group) for group in lists[:4])
    ema_params, o = lists[4], options
    if ema_params is not None:
        for dtype in {tensor.dtype for tensor in ema_params}:
            chosen = [i for i, tensor in enumerate(ema_params) if tensor.dtype == dtype]
            old = [params[i].to(dtype) for i in chosen]
            torch._foreach_lerp_([ema_params[i] for i in chosen], old, 1.0 - o.ema_decay)
    if isinstance(grad_scale, Tensor) or grad_scale != 1.0:
        grads = list(torch._foreach_mul(grads, grad_scale))  # a copy: the caller's gradients stay as they are
    if o.weight_decay != 0.0:
        torch._foreach_mul_(params, 1.0 - o.lr * o.weight_decay)
    torch._foreach_lerp_(exp_avgs, grads, 1.0 - o.beta1)
    torch._foreach_mul_(exp_avg_sqs, o.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1.0 - o.beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, math.sqrt(1.0 - o.beta2**o.step))
    torch._foreach_add_(denominators, o.eps)
    torch._foreach_addcdiv_(params, exp_avgs, denominators, -o.lr / (1.0 - o.beta1**o.step))


def _run_native(lists: TensorLists, options: AdamwEmaOptions, grad_scale: float | Tensor) -> None:
    adamw_ema_native.adamw_ema_cpu_(*lists, options, float(grad_scale))


def _run_cuda(lists: TensorLists, options: AdamwEmaOptions, grad_scale: float | Tensor) -> None:
    if isinstance(grad_scale, Tensor) and grad_scale.device.type == "cuda":
        scale = grad_scale.detach().to(device=lists[0][0].device, dtype=torch.float32)
        adamw_ema_native.adamw_ema_cuda_(*lists, options, 1.0, scale)
    else:
        adamw_ema_native.adamw_ema_cuda_(*lists, options, float(grad_scale), None)


def _norm_eager(grads: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(grads, 2.0, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack([norm.to(grads[0].device) for norm in norms]))


def _norm_native(grads: list[Tensor]) -> Tensor:
    return torch.tensor(math.sqrt(adamw_ema_native.sum_of_squares_cpu(grads)), dtype=torch.float32)


def _fp32_contiguous_on(device_type: str, *tensors: Tensor) -> str | None:
    for tensor in tensors:
        if tensor.device.type != device_type:
            return f"it runs on {device_type} tensors, one is on {tensor.device}"
        if tensor.dtype != torch.float32:
            return f"it takes float32, one tensor is {tensor.dtype}"
        if not tensor.is_contiguous():
            return f"it takes contiguous tensors, one of shape {tuple(tensor.shape)} has strides {tensor.stride()}"
    return None


def _why_not_cuda(*tensors: Tensor) -> str | None:
    return _fp32_contiguous_on("cuda", *tensors)


def _why_not_native(*tensors: Tensor) -> str | None:
    return _fp32_contiguous_on("cpu", *tensors)


def _no_cuda() -> str | None:
    return "no CUDA device" if not torch.cuda.is_available() else native.why_missing("cuda")


def _no_native() -> str | None:
    return native.why_missing("cpu")


register(
    Backend("adamw_ema", "cuda", _run_cuda, "csrc, one pass over memory", _no_cuda, _why_not_cuda),
    Backend("adamw_ema", "native", _run_native, "csrc, one pass over memory, OpenMP", _no_native, _why_not_native),
    Backend("adamw_ema", "eager", _run_eager, "torch foreach; any device, dtype, layout"),
    Backend("grad_norm", "native", _norm_native, "csrc, one read, any number of threads", _no_native, _why_not_native),
    Backend("grad_norm", "eager", _norm_eager, "torch foreach; any device and dtype"),
)
