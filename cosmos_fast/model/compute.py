"""Sets a model up for the way of computing that a run asks for; names and shapes of its state dict stay."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import torch
from torch import nn

from cosmos_fast.config import ComputeConfig, ModelConfig
from cosmos_fast.model.cosmos import CosmosModel, create_model
from cosmos_fast.model.cross_pool import CrossAttentionPool
from cosmos_fast.model.fp8 import use_fp8_linear
from cosmos_fast.model.savings import Savings
from cosmos_fast.model.vision_graphs import use_vision_graphs
from cosmos_fast.ops.backends import choose, why_triton_cannot_compile
from cosmos_fast.ops.layer_norm import OP as add_layer_norm_op
from cosmos_fast.utils import nvidia_apex
from cosmos_fast.utils.capabilities import why_unusable
from cosmos_fast.utils.errors import UserError

COMPILER = "inductor"


def apply_compute(model: CosmosModel, compute: ComputeConfig, device: torch.device) -> None:
    """Set up `model`, which lies on `device`, in place; `compute.optimizer` is the engine's.

    Raises:
        UserError: what this machine cannot do.
    """
    model.set_attention(compute.attention, device)
    if compute.compile and (reason := why_no_compiler(device)) is not None:
        raise UserError(f"compute.compile=true needs a compiler, but {reason}; set compute.compile=false")
    if compute.layer_norm == "apex":
        _use_fused_layer_norm(model, nvidia_apex.fused_layer_norm(device))
    residual_norm = _residual_norm(device) if compute.layer_norm == "triton" else None
    savings = Savings(compute.checkpoint_activations, COMPILER if compute.compile else None)
    blocks = [*model.transformer.blocks, *model.visual.transformer.blocks]
    for block in blocks:
        block.savings, block.residual_norm = savings, residual_norm
    if compute.linear == "fp8":
        use_fp8_linear(blocks, compute.fp8_backend, device)
    if compute.cuda_graphs:
        use_vision_graphs(model.visual, device)


def why_not_here(model: ModelConfig, compute: ComputeConfig, device: torch.device) -> str | None:
    """What stands against `compute` on `device`, None for nothing. No weights are allocated."""
    try:
        with torch.device("meta"):
            apply_compute(create_model(model), compute, device)
        if compute.optimizer == "apex":
            nvidia_apex.fused_adam(device)
    except UserError as error:
        return str(error)
    return None


def _residual_norm(device: torch.device) -> str:
    """The backend that adds and normalises in one pass."""
    try:
        return choose(add_layer_norm_op, "triton", torch.empty(1, 1, device=device)).name
    except ValueError as error:
        raise UserError(f"{error}; set compute.layer_norm=torch") from None


def _use_fused_layer_norm(model: nn.Module, make: Callable[..., nn.Module]) -> None:
    """Layer norms of the towers by another class, with the same parameters.

    The poolers have their own arithmetic. `ln_pre` stays: under autocast apex's norm gives half precision, which is
    what the products behind all others take, but behind this one is the residual stream.
    """
    for parent in model.modules():
        if isinstance(parent, CrossAttentionPool):
            continue
        for name, plain in list(parent.named_children()):
            if type(plain) is nn.LayerNorm and name != "ln_pre":
                fused = make(plain.normalized_shape[0], eps=plain.eps)
                fused.weight, fused.bias = plain.weight, plain.bias
                setattr(parent, name, fused)


def why_no_compiler(device: torch.device) -> str | None:
    """What torch.compile misses to make code for `device`, None for nothing."""
    if device.type == "cpu":
        name = os.environ.get("CXX", "g++")
        return None if shutil.which(name) else f"{name} is not found (CXX names another one)"
    return why_unusable("triton") or why_triton_cannot_compile()
