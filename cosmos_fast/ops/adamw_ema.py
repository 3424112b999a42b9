"""AdamW, the teacher's exponential moving average and what belongs to them, in one pass over memory.

    s   = grad_scale * min(1, clip_norm / (|grad_scale| * norm + 1e-6))     norm: L2 over all gradients
    ema <- ema_decay * ema + (1 - ema_decay) * param                        the parameter from BEFORE the step
    exp_avg, exp_avg_sq, param <- AdamW as torch.optim.AdamW on s * grad    (decoupled weight decay, bias correction)
    the logarithmic scales among the parameters, and their averages, clamped to [0, ln 100]
    bf16 copies of param and ema

36 B an element, 2 more a copy; the norm reads the gradients once before, 4 B.

Backends of `adamw_ema` and `grad_norm`:
    cuda    csrc/adamw_ema_cuda.cu, grad_norm_cuda.cu: a launch per 42 tensors. Compiled for sm_80 and sm_90a; not yet
            run on hardware.
    triton  cosmos_kernels/adamw_ema_triton.py: one launch for all tensors
    native  csrc/adamw_ema_cpu.cpp: one OpenMP loop over all tensors
    eager   torch's foreach operations: any device, dtype and layout
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from cosmos_fast.ops import adamw_ema_stages as stages
from cosmos_fast.ops.adamw_ema_stages import MAX_LOG_SCALE as MAX_LOG_SCALE

Tensors = Tensor | Sequence[Tensor]
_OPTIONAL = ("ema_params", "param_copies", "ema_copies")
_GROUPS = ("params", "grads", "exp_avgs", "exp_avg_sqs", *_OPTIONAL)


@torch.no_grad()
def adamw_ema_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    ema_params: Tensors | None = None,
    *,
    step: int | Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | Sequence[float],
    ema_decay: float,
    grad_scale: float | Tensor = 1.0,
    clip_norm: float | None = None,
    norm: Tensor | None = None,
    skip_nonfinite: bool = False,
    log_scales: Sequence[int] = (),
    param_copies: Tensors | None = None,
    ema_copies: Tensors | None = None,
    backend: str = "auto",
) -> Tensor | None:
    """One optimizer step with the teacher's update in front, in place. Nothing waits for a GPU.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: lists of equal length, or a flat tensor each; entry i of all of them has
            one shape, dtype and device. All tensors of a call lie on one device.
        ema_params: the teacher's, shaped alike; None leaves the average out. It may differ in dtype (eager only).
        step, weight_decay: one for all, or one a tensor. step is the number of this update, from 1.
        grad_scale: multiplies the gradients (loss scaling); a 0-dim tensor is read where it lies.
        clip_norm: the gradients are scaled so that their norm is at most this; None: no clipping.
        norm: the gradients' L2 norm before any factor, where the caller knows it (sharded gradients, say), 0-dim; read
            where it lies. None: computed here, if clipping or skipping needs it.
        skip_nonfinite: leave every bit as it was where the norm is NaN or Inf.
        log_scales: positions of the logarithmic logit scales, clamped to [0, ln 100] after the step, and their
            averages with them. In a flat buffer, pass views of its parts instead of the whole.
        param_copies, ema_copies: contiguous bf16 tensors that receive the new params and ema_params.
        backend: "auto", "eager", "native" (CPU), "triton" or "cuda".

    Returns:
        The gradients' norm before any factor, 0-dim fp32 on their device; None where nothing needed it.

    Raises:
        ValueError: lists that do not match, numbers out of range, or an explicit backend that cannot take them.
    """
    _check_hyper(lr, eps, {"beta1": beta1, "beta2": beta2}, ema_decay, clip_norm)
    groups = _listed(params, grads, exp_avgs, exp_avg_sqs, ema_params, param_copies, ema_copies)
    _check(groups)
    count = len(groups["params"])
    per_tensor = _per_tensor(count, step, weight_decay, log_scales)
    scalars = [_scalar(name, x, groups["params"]) for name, x in (("grad_scale", grad_scale), ("norm", norm))]
    if norm is None and (clip_norm is not None or skip_nonfinite):
        norm = scalars[1] = grad_norm(groups["grads"], backend=backend)
    if not count:
        return norm
    hyper = _floats(lr, beta1, beta2, eps, ema_decay, 1.0 if isinstance(grad_scale, Tensor) else grad_scale)
    step_: Callable[..., None] = stages.step_ if _traced(groups["params"]) else stages.run_step_
    step_(*groups.values(), *scalars, *per_tensor, hyper, clip_norm and float(clip_norm), skip_nonfinite, backend)
    return norm


@torch.no_grad()
def grad_norm(grads: Iterable[Tensor], *, backend: str = "auto") -> Tensor:
    """L2 norm over all elements of all gradients: 0-dim fp32 tensor on their device (CPU for an empty list).

    Deterministic; nothing waits for a GPU. Raises ValueError for integers, or a backend that cannot take them.
    """
    grads = list(grads)
    if not grads:
        return torch.zeros(())
    _check_floating("grads", grads)
    return stages.norm(grads, backend)


def _traced(tensors: list[Tensor]) -> bool:
    """Whether a compiler looks on, and must see a custom op. Without one it costs 5 us a tensor for nothing."""
    return torch.compiler.is_compiling() or type(tensors[0]) not in (Tensor, torch.nn.Parameter)


def _listed(*given: Tensors | None) -> dict[str, list[Tensor]]:
    """Each argument as a list; an empty one for what is left out."""
    groups: dict[str, list[Tensor]] = {}
    for name, group in zip(_GROUPS, given, strict=True):
        groups[name] = [group] if isinstance(group, Tensor) else list(() if group is None else group)
        if group is not None and not groups[name] and groups["params"]:
            raise ValueError(f"{name} has 0 tensors, params has {len(groups['params'])}")
    if groups["ema_copies"] and not groups["ema_params"]:
        raise ValueError("ema_copies without ema_params: there is nothing to copy")
    return groups


def _per_tensor(
    count: int, step: int | Sequence[int], weight_decay: float | Sequence[float], log_scales: Sequence[int]
) -> tuple[list[int], list[float], list[int]]:
    """steps, weight_decays, and 1 for a tensor to clamp, else 0; one entry a tensor each."""
    steps = [step] * count if isinstance(step, int) else list(step)
    decays = [weight_decay] * count if isinstance(weight_decay, (int, float)) else list(weight_decay)
    for name, values in (("step", steps), ("weight_decay", decays)):
        if len(values) != count:
            raise ValueError(f"{name} has {len(values)} entries, params has {count}: give one for all, or one each")
    if any(one < 1 for one in ([step] if isinstance(step, int) else steps)):
        raise ValueError(f"step is {step}; the first update has step 1")
    clamped = [0] * count
    for position in log_scales:
        if not 0 <= position < count:
            raise ValueError(f"log_scales names tensor {position}, params has {count}")
        clamped[position] = 1
    return steps, _floats(*decays), clamped


def _floats(*numbers: float) -> list[float]:
    """Whole numbers are of another type to a compiler."""
    return [float(number) for number in numbers]


def _scalar(name: str, value: Tensor | float | None, params: list[Tensor]) -> Tensor | None:
    """A tensor as the backends read it: 0-dim fp32 on the parameters' device; None for what is none."""
    if not isinstance(value, Tensor):
        return None
    if value.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected a scalar")
    return value.detach().reshape(()).to(device=params[0].device if params else None, dtype=torch.float32)


def _check_hyper(lr: float, eps: float, betas: dict[str, float], ema_decay: float, clip_norm: float | None) -> None:
    """Backends would each make something else of these: a negative clip_norm turns gradients round, or does nothing."""
    for name, value in (("lr", lr), ("eps", eps)):
        if not value >= 0.0:
            raise ValueError(f"{name} is {value}, expected 0 or more")
    for name, value in betas.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} is {value}, expected 0 to below 1")
    if not 0.0 <= ema_decay <= 1.0:
        raise ValueError(f"ema_decay is {ema_decay}, expected 0 to 1")
    if clip_norm is not None and not clip_norm > 0.0:
        raise ValueError(f"clip_norm is {clip_norm}, expected a positive number, or None for no clipping")


def _check(groups: dict[str, list[Tensor]]) -> None:
    """Every list as long as params; entry i of every list like params[i]; one device."""
    params = groups["params"]
    _check_floating("params", params)
    shapes, dtypes = [param.shape for param in params], [param.dtype for param in params]
    devices = {param.device for param in params}
    for name, group in groups.items():
        if not group and name in _OPTIONAL:
            continue
        if len(group) != len(params):
            raise ValueError(f"{name} has {len(group)} tensors, params has {len(params)}")
        found = [tensor.dtype for tensor in group]
        wanted = found if name == "ema_params" else [torch.bfloat16] * len(params) if "copies" in name else dtypes
        if [tensor.shape for tensor in group] != shapes or found != wanted:
            raise ValueError(_first_odd(name, group, shapes, wanted))
        devices |= {tensor.device for tensor in group}
        if len(devices) > 1:
            odd = next(i for i, tensor in enumerate(group) if tensor.device != params[0].device)
            raise ValueError(f"{name}[{odd}] is on {group[odd].device}, params[0] on {params[0].device}")
        if "copies" in name and not all(map(Tensor.is_contiguous, group)):
            raise ValueError(f"{name} holds a tensor that is not contiguous")


def _check_floating(name: str, tensors: list[Tensor]) -> None:
    for dtype in {tensor.dtype for tensor in tensors}:
        if not dtype.is_floating_point:
            odd = next(i for i, tensor in enumerate(tensors) if tensor.dtype == dtype)
            raise ValueError(f"{name}[{odd}] has dtype {dtype}, expected a floating-point dtype")


def _first_odd(name: str, group: list[Tensor], shapes: list[torch.Size], dtypes: list[torch.dtype]) -> str:
    """What is wrong with the first tensor that is not as it should be."""
    for i, (tensor, shape, dtype) in enumerate(zip(group, shapes, dtypes, strict=True)):
        if tensor.shape != shape:
            return f"{name}[{i}] has shape {tuple(tensor.shape)}, expected {tuple(shape)} as params[{i}]"
        if tensor.dtype != dtype:
            return f"{name}[{i}] has dtype {tensor.dtype}, expected {dtype} as params[{i}]"
    raise AssertionError("all are as they should be")
