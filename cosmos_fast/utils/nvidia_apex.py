"""NVIDIA's apex, where it is installed: its fused layer norm and its fused Adam. Not yet run on hardware.

The package of that name on PyPI is another program; NVIDIA's is built from its repository, with --cuda_ext.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from cosmos_fast.utils.capabilities import why_unusable
from cosmos_fast.utils.errors import UserError

DEVICES = ("cuda",)


def fused_adam(device: torch.device) -> Any:
    """The class apex.optimizers.FusedAdam."""
    return _find("compute.optimizer=apex", "use fused", "apex.optimizers", "FusedAdam", device)


def fused_layer_norm(device: torch.device) -> Any:
    """The class apex.normalization.FusedLayerNorm."""
    return _find("compute.layer_norm=apex", "use torch", "apex.normalization", "FusedLayerNorm", device)


def _find(setting: str, instead: str, module: str, name: str, device: torch.device) -> Any:
    reason = why_unusable("apex")
    if reason is None and device.type not in DEVICES:
        reason = f"apex runs on CUDA only, this run is on {device.type}"
    if reason is None:
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError, RuntimeError) as error:
            reason = f"{module}.{name} is not in this apex ({error})"
    raise UserError(f"{setting}: {reason}; {instead}")
