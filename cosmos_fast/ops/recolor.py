"""The colour half of the augmentation of uint8 crops, in place: jitter, grey, blur, solarise, flip.

Follows PIL's arithmetic (8-bit levels after every operation, HSV with 8-bit hue and saturation, Gaussian blur as three
box blurs). Crops are independent: a crop's bytes do not depend on what else is in the batch.

Backends of `recolor`:
    native  csrc/recolor_cpu.cpp: the bits that PIL gives, crop by crop in the cache
    eager   recolor_eager.py: torch on any device, a level away from PIL here and there
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos_fast.ops import recolor_eager
from cosmos_fast.ops.backends import Backend, choose, register, resolve
from cosmos_fast.ops.recolor_numbers import ColorNumbers
from cosmos_kernels import native, recolor_native


def recolor_(pixels: Tensor, numbers: ColorNumbers, *, backend: str = "auto") -> Tensor:
    """Apply the numbers to uint8 crops [N, 3, H, W], in place.

    Args:
        pixels: on any device, at least a pixel wide and high.
        numbers: N rows.
        backend: "auto", "native" (CPU) or "eager".

    Returns:
        `pixels`.

    Raises:
        ValueError: other shapes or types, or an explicit backend that cannot take them.
    """
    if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels: want uint8 [N, 3, H, W], not {pixels.dtype} {list(pixels.shape)}")
    if any(len(column) != len(pixels) for column in numbers):
        raise ValueError(f"numbers: want {len(pixels)} rows, as there are crops")
    if pixels.numel():
        resolve("recolor", backend, pixels).backend.stages(pixels, numbers)
    return pixels


def announce(device: torch.device) -> None:
    """Choose as for crops on this device, and log it where it is a new choice: the loader's workers do not."""
    choose("recolor", "auto", torch.empty(0, 3, 1, 1, dtype=torch.uint8, device=device))


def _native(pixels: Tensor, numbers: ColorNumbers) -> None:
    recolor_native.recolor_(pixels, *(torch.from_numpy(column) for column in numbers))


def _why_not_native(pixels: Tensor) -> str | None:
    if pixels.device.type != "cpu":
        return f"it runs on cpu tensors, not on {pixels.device}"
    return None if pixels.is_contiguous() else f"it takes contiguous tensors, not strides {pixels.stride()}"


register(
    Backend(
        "recolor",
        "native",
        _native,
        "csrc, PIL's bits, OpenMP",
        lambda: native.why_missing("cpu"),
        _why_not_native,
    ),
    Backend("recolor", "eager", recolor_eager.recolor_, "torch; any device and layout"),
)
