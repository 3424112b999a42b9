"""What one fused optimizer step works on: the arguments that every backend of `adamw_ema_` takes.

The caller has checked them: lists of equal length, entry i of each of one shape; all tensors on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AdamwEmaTensors:
    """Lists with one entry a tensor. Updated in place: all but grads, grad_scale and norm.

    ema_params, param_copies, ema_copies: None leaves them out; the copies are bf16.
    steps: number of this update, from 1. weight_decays: of each tensor. clamped: 1 where the tensor, and its average,
    are clamped to [options.low, options.high], else 0.
    grad_scale: None, or a 0-dim fp32 tensor that multiplies options.grad_scale.
    norm: None, or the L2 norm of all gradients before any factor, 0-dim fp32; clipping and skipping need it.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    ema_params: Sequence[Tensor] | None
    param_copies: Sequence[Tensor] | None
    ema_copies: Sequence[Tensor] | None
    steps: Sequence[int]
    weight_decays: Sequence[float]
    clamped: Sequence[int]
    grad_scale: Tensor | None
    norm: Tensor | None


@dataclass(frozen=True, kw_only=True)
class AdamwEmaOptions:
    """Hyper-parameters that all tensors of a step share.

    clip_norm: gradients are scaled so that their norm is at most this; None: no clipping. skip_nonfinite: nothing is
    written where the norm is NaN or Inf.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    ema_decay: float
    grad_scale: float
    clip_norm: float | None
    low: float
    high: float
    skip_nonfinite: bool
