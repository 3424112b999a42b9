"""Sets a model up for the way of computing that a run asks for; names and shapes of its state dict stay."""

from __future__ import annotations

from dataclasses import fields

import torch

from cosmos_fast.config import ComputeConfig
from cosmos_fast.model.cosmos import CosmosModel
from cosmos_fast.utils.errors import UserError

_ELSEWHERE = ("optimizer",)  # fields that are not about the model


def apply_compute(model: CosmosModel, compute: ComputeConfig, device: torch.device) -> None:
    """Set up `model`, which lies on `device`, in place.

    Raises:
        UserError: what this machine cannot do, or what is not implemented.
    """
    for field in fields(compute):
        value = getattr(compute, field.name)
        if value != field.default and field.name not in _ELSEWHERE:
            raise UserError(f"compute.{field.name}={value} is not implemented yet: leave it at {field.default}")
