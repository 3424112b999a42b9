"""The optimizer step in torch's foreach operations: any device, dtype and layout; the oracle of the others."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from cosmos_kernels.adamw_ema_call import AdamwEmaOptions, AdamwEmaTensors


def grad_norm_eager(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm over all elements of all tensors, 0-dim fp32."""
    wide = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    norms = torch._foreach_norm(list(grads), 2.0, dtype=wide)
    return torch.linalg.vector_norm(torch.stack([norm.to(grads[0].device) for norm in norms])).float()


def adamw_ema_eager_(t: AdamwEmaTensors, o: AdamwEmaOptions) -> None:
    """The step of adamw_ema_. `skip_nonfinite` reads the norm on the host."""
    if o.skip_nonfinite and t.norm is not None and not bool(torch.isfinite(t.norm)):
        return
    if t.ema_params is not None:
        _average(t.ema_params, t.params, o.ema_decay)
    scale = _scale(t, o)
    grads: Sequence[Tensor] = t.grads
    if isinstance(scale, Tensor) or scale != 1.0:
        grads = torch._foreach_mul(list(grads), scale)  # new tensors: the caller's gradients stay as they are
    groups: dict[tuple[int, float], list[int]] = defaultdict(list)
    for i, key in enumerate(zip(t.steps, t.weight_decays, strict=True)):
        groups[key].append(i)
    for (step, weight_decay), chosen in groups.items():
        params, some_grads, exp_avgs, exp_avg_sqs = (
            [group[i] for i in chosen] for group in (t.params, grads, t.exp_avgs, t.exp_avg_sqs)
        )
        _adamw(params, some_grads, exp_avgs, exp_avg_sqs, o, step, weight_decay)
    for group in (t.params, t.ema_params):
        for tensor, clamped in zip(group or (), t.clamped, strict=group is not None):
            if clamped:
                tensor.clamp_(o.low, o.high)
    for copies, group in ((t.param_copies, t.params), (t.ema_copies, t.ema_params)):
        if copies is not None and group is not None:
            torch._foreach_copy_(list(copies), list(group))


def _scale(t: AdamwEmaTensors, o: AdamwEmaOptions) -> float | Tensor:
    """The factor of the gradients: theirs, and what clipping makes of it."""
    scale: float | Tensor = o.grad_scale
    if t.grad_scale is not None:
        scale = o.grad_scale * t.grad_scale
    if o.clip_norm is None or t.norm is None:
        return scale
    magnitude = scale.abs() if isinstance(scale, Tensor) else abs(scale)
    factor: Tensor = o.clip_norm / (t.norm * magnitude + 1e-6)
    return factor.clamp(max=1.0) * scale


def _average(averages: Sequence[Tensor], params: Sequence[Tensor], decay: float) -> None:
    for dtype in {tensor.dtype for tensor in averages}:
        chosen = [i for i, tensor in enumerate(averages) if tensor.dtype == dtype]
        torch._foreach_lerp_([averages[i] for i in chosen], [params[i].to(dtype) for i in chosen], 1.0 - decay)


def _adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    o: AdamwEmaOptions,
    step: int,
    weight_decay: float,
) -> None:
    """torch.optim.AdamW's step over one group."""
    if weight_decay != 0.0:
        torch._foreach_mul_(params, 1.0 - o.lr * weight_decay)
    torch._foreach_lerp_(exp_avgs, grads, 1.0 - o.beta1)
    torch._foreach_mul_(exp_avg_sqs, o.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1.0 - o.beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, math.sqrt(1.0 - o.beta2**step))
    torch._foreach_add_(denominators, o.eps)
    torch._foreach_addcdiv_(params, exp_avgs, denominators, -o.lr / (1.0 - o.beta1**step))
