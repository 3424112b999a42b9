"""NVIDIA's apex, where it is installed: its fused layer norm and its fused Adam. Not yet run on hardware.

The package of that name on PyPI is another program; NVIDIA's is built from its repository, with --cuda_ext.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from cosmos_fast.utils.capabilities import why_unusable
from cosmos_fast.utils.errors import UserError

DEVICES = ("cuda",)


def fused_adam(device: torch.device) -> Any:
    """The class apex.optimizers.FusedAdam."""
    parameter = nn.Parameter(torch.zeros(1, device=device))
    return _find(
        *("compute.optimizer=apex", "use fused", "apex.optimizers", "FusedAdam", device),
        make=lambda found: found([parameter]),
    )


def fused_layer_norm(device: torch.device) -> Any:
    """The class apex.normalization.FusedLayerNorm."""
    return _find(
        *("compute.layer_norm=apex", "use torch", "apex.normalization", "FusedLayerNorm", device),
        make=lambda found: found(1),
    )


def _find(
    setting: str, instead: str, module: str, name: str, device: torch.device, make: Callable[[Any], object]
) -> Any:
    """The class. An apex without its CUDA part imports, and refuses when an object is made: `make` makes one."""
    reason = why_unusable("apex")
    if reason is None and device.type not in DEVICES:
        reason = f"apex runs on CUDA only, this run is on {device.type}"
    if reason is None:
        try:
            found = getattr(import_module(module), name)
            make(found)
            return found
        except (ImportError, AttributeError, RuntimeError) as error:
            reason = f"this apex has no {module}.{name} that works ({error})"
    raise UserError(f"{setting}: {reason}; {instead}")
