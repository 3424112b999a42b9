"""Many small host tensors to a GPU in one copy that nobody waits for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: every dtype may start there
Structure = TypeVar("Structure")


def move(structure: Structure, device: torch.device) -> Structure:
    """The same structure with its host tensors on `device`.

    Args:
        structure: a tensor, or tuples, lists, dictionaries and dataclasses that hold tensors. A tensor that occurs
            several times stays one tensor; what lies on another device than the CPU already is left alone.
        device: where to. A copy to a GPU goes through one pinned buffer; the host does not wait for it.
    """
    if device.type == "cpu":
        return structure
    found: dict[int, Tensor] = {}
    _rebuild(structure, lambda tensor: found.setdefault(id(tensor), tensor))
    on_host = {key: tensor for key, tensor in found.items() if tensor.device.type == "cpu"}
    moved = dict(zip(on_host, copy_together(list(on_host.values()), device), strict=True))
    result: Structure = _rebuild(structure, lambda tensor: moved.get(id(tensor), tensor))
    return result


def copy_together(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of host tensors on `device`: slices of one buffer, each in its own dtype and shape."""
    starts, size = [], 0
    for tensor in tensors:
        starts.append(size)
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for start, tensor in zip(starts, tensors, strict=True):
        _slice_like(buffer, start, tensor).copy_(tensor)
    copied = buffer.to(device, non_blocking=True)
    return [_slice_like(copied, start, tensor) for start, tensor in zip(starts, tensors, strict=True)]


def _slice_like(buffer: Tensor, start: int, tensor: Tensor) -> Tensor:
    return buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _rebuild(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {item.name: _rebuild(getattr(value, item.name), change) for item in fields(value)}
        return replace(value, **changed)
    if isinstance(value, (tuple, list)):
        return type(value)(_rebuild(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _rebuild(item, change) for key, item in value.items()}
    return value
