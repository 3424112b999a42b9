"""The colour half of the augmentation in torch, batched over crops, on any device.

Follows PIL's arithmetic, so that a crop differs from one made by PIL by a level here and there. One call recolours
hundreds of small crops, where PIL would take several calls a crop; on a GPU the workers are left with decoding and
resizing. N crops, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from cosmos_fast.ops.recolor_numbers import JITTER_OPS, NO_SOLARIZE, ColorNumbers

# Values a chunk holds: 1 MB as float32 stays in a CPU's second-level cache; on a GPU 256 MB bounds the memory.
_CHUNK_VALUES = 1 << 18
_GPU_CHUNK_VALUES = 1 << 26
_BLUR_PASSES = 3


def recolor_(pixels: torch.Tensor, numbers: ColorNumbers) -> None:
    """See ops/recolor.py."""
    values = _GPU_CHUNK_VALUES if pixels.is_cuda else _CHUNK_VALUES
    chunk = max(1, values // pixels[0].numel())
    for start in range(0, len(pixels), chunk):
        part = slice(start, start + chunk)
        x = _recolor(pixels[part].float(), ColorNumbers(*(column[part] for column in numbers)))
        pixels[part] = x.int()  # float to 8 bits in one step is three times as slow on a CPU


def _recolor(x: torch.Tensor, numbers: ColorNumbers) -> torch.Tensor:
    for slot in range(numbers.order.shape[1]):
        for operation, change in enumerate(_JITTER):
            chosen = numbers.order[:, slot] == operation
            x = _on_rows(x, chosen, change, numbers.amount[:, slot])
    x = _on_rows(x, numbers.gray, _gray, None)
    x = _on_rows(x, numbers.blur_radius > 0, _blur, numbers.blur_radius)
    x = _on_rows(x, numbers.solarize_threshold < NO_SOLARIZE, _solarize, numbers.solarize_threshold)
    return _on_rows(x, numbers.flip, _flip, None)


def _on_rows(
    x: torch.Tensor, chosen: np.ndarray, change: Callable[..., torch.Tensor], amount: np.ndarray | None
) -> torch.Tensor:
    """`x` with the chosen rows changed. chosen: bool [N]. amount: float32 [N], its chosen rows go to `change`."""
    rows = np.flatnonzero(chosen)
    if len(rows) == 0:
        return x
    arguments = () if amount is None else (amount[rows],)
    if len(rows) == len(x):
        return change(x, *arguments)
    there = torch.from_numpy(rows).to(x.device, non_blocking=True)
    x[there] = change(x[there], *arguments)
    return x


def _column(amount: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(amount).to(like.device, non_blocking=True).view(-1, 1, 1, 1)


def _luma(x: torch.Tensor) -> torch.Tensor:
    """ITU-R 601 grey in PIL's 16-bit fixed point, [N, 1, H, W]; exact in float32, all sums stay below 2^24."""
    r, g, b = x.unbind(1)
    return ((r * 19595 + g * 38470 + b * 7471 + 32768) / 65536).floor_().unsqueeze(1)


def _blend(degenerate: torch.Tensor, x: torch.Tensor, factor: np.ndarray) -> torch.Tensor:
    return (x - degenerate).mul_(_column(factor, x)).add_(degenerate).clamp_(0, 255).floor_()


def _brightness(x: torch.Tensor, factor: np.ndarray) -> torch.Tensor:
    return (x * _column(factor, x)).clamp_(0, 255).floor_()


def _contrast(x: torch.Tensor, factor: np.ndarray) -> torch.Tensor:
    # float64 sums of whole numbers are exact, so the mean does not depend on how they were added up
    mean = _luma(x).sum((1, 2, 3), keepdim=True, dtype=torch.float64) / x[0, 0].numel()
    return _blend((mean + 0.5).floor().float(), x, factor)


def _saturation(x: torch.Tensor, factor: np.ndarray) -> torch.Tensor:
    return _blend(_luma(x), x, factor)


def _hue(x: torch.Tensor, turns: np.ndarray) -> torch.Tensor:
    """Shift the hue of HSV, with hue and saturation rounded down to 8 bits as PIL stores them."""
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    # in sextants: 0 + (g - b) / chroma next to red, 2 + (b - r) / chroma next to green, 4 + (r - g) / chroma to blue
    above = torch.where(g == value, (b - r).add_(chroma, alpha=2), (r - g).add_(chroma, alpha=4))
    hue = torch.where(r == value, g - b, above).div_(chroma.clamp(min=1)).div_(6)
    hue = hue.sub_(hue.floor()).mul_(255).floor_()
    hue.add_(_column(np.trunc(turns * 255) + 256, x).squeeze(1))
    hue.sub_((hue / 256).floor_().mul_(256)).mul_(6 / 255)
    saturation = (chroma * 255).div_(value.clamp(min=1)).floor_().div_(255)
    # every channel falls from the value by value * saturation times a trapezoid of its distance in hue
    offsets = torch.arange(5.0, 0.0, -2.0, device=x.device).view(1, 3, 1, 1)  # made there: a copy would wait
    k = hue.unsqueeze(1) + offsets
    k.sub_((k / 6).floor_().mul_(6))
    trapezoid = torch.minimum(k, 4 - k).clamp_(0, 1)
    return trapezoid.mul_(saturation.mul_(value).neg_().unsqueeze(1)).add_(value.unsqueeze(1)).add_(0.5).floor_()


def _gray(x: torch.Tensor) -> torch.Tensor:
    return _luma(x).expand_as(x).contiguous()


def _solarize(x: torch.Tensor, threshold: np.ndarray) -> torch.Tensor:
    return torch.where(x < _column(threshold, x), x, 255 - x)


def _flip(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1)


def _blur(x: torch.Tensor, radius: np.ndarray) -> torch.Tensor:
    """Gaussian of standard deviation `radius` as PIL makes it: three box blurs an axis, rounded each time.

    Extended box blur (Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering",
    2011): a box of whole half-width `half` whose end taps are scaled by `end`, so that its variance is exact.
    """
    variance = radius.astype(np.float64) ** 2 / _BLUR_PASSES
    half = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    end = (2 * half + 1) * (half * (half + 1) - 3 * variance) / (6 * (variance - (half + 1) ** 2))
    reach = int(half.max()) + 1
    steps = np.arange(reach + 1)[:, None]
    taps = np.where(steps <= half, 1.0, np.where(steps == half + 1, end, 0.0)) / (2 * (half + end) + 1)
    weights = [_column(tap, x) for tap in taps.astype(np.float32)]
    for axis, padding in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        length = x.shape[axis]
        for _ in range(_BLUR_PASSES):
            padded = F.pad(x, padding, mode="replicate")
            x = padded.narrow(axis, reach, length) * weights[0]
            for step in range(1, reach + 1):
                pair = padded.narrow(axis, reach - step, length) + padded.narrow(axis, reach + step, length)
                x.addcmul_(pair, weights[step])
            x.add_(0.5).floor_()
    return x


_JITTER = (_brightness, _contrast, _saturation, _hue)
assert len(_JITTER) == len(JITTER_OPS)
