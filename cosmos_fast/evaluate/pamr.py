"""Pixel-adaptive refinement of maps (PAMR, CVPR 2020, arXiv 2005.08104): a pixel takes from neighbours of its colour.

Axis legend: S maps, K neighbours, H, W pixels.

Neighbours of a pixel are the 8 around it at each of some distances (dilations), at the border those of the nearest
pixel inside. With pixel colours x and their standard deviation s over the neighbours and as often the pixel itself,
neighbour j weighs softmax over j of -mean over channels of |x - x_j| / (0.1 s + 1e-8). A step replaces every map's
value by the weighted sum of its neighbours'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

_AROUND = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
# Values of maps that are refined at a time, 4 bytes each.
GROUP_ELEMENTS = 2**24


def refine(map_HWS: Tensor, pixels_3hw: Tensor, steps: int, dilations: Sequence[int]) -> Tensor:
    """Maps [H, W, S] after some steps; pixels of any size, resized bilinearly to that of the maps."""
    height, width, depth = map_HWS.shape
    image_3HW = functional.interpolate(
        pixels_3hw[None].to(map_HWS), size=(height, width), mode="bilinear", align_corners=False
    )[0]
    weight_KHW = affinities(image_3HW, dilations)
    refined_HWS = torch.empty_like(map_HWS)
    step = max(1, GROUP_ELEMENTS // (height * width))
    for start in range(0, depth, step):
        maps_SHW = map_HWS[..., start : start + step].permute(2, 0, 1).contiguous()
        for _ in range(steps):
            parts = zip(weight_KHW, neighbours(maps_SHW, dilations), strict=True)
            maps_SHW = sum((weight_HW * part_SHW for weight_HW, part_SHW in parts), torch.zeros_like(maps_SHW))
        refined_HWS[..., start : start + step] = maps_SHW.permute(1, 2, 0)
    return refined_HWS


def affinities(image_3HW: Tensor, dilations: Sequence[int]) -> Tensor:
    """Weights [K, H, W] of each pixel's neighbours, which sum to 1; in the order of `neighbours`."""
    count = len(dilations) * (len(_AROUND) + 1)
    # The pixel itself, once a dilation, is what the deviations are taken from: it adds nothing to either sum.
    total_3HW, square_3HW = torch.zeros_like(image_3HW), torch.zeros_like(image_3HW)
    for part_3HW in neighbours(image_3HW, dilations):
        apart_3HW = part_3HW - image_3HW
        total_3HW += apart_3HW
        square_3HW += apart_3HW.square()
    variance_3HW = (square_3HW - total_3HW.square() / count).clamp_(min=0) / (count - 1)
    width_3HW = 0.1 * variance_3HW.sqrt_() + 1e-8
    scores = [-((part_3HW - image_3HW).abs() / width_3HW).mean(dim=0) for part_3HW in neighbours(image_3HW, dilations)]
    return torch.stack(scores).softmax(dim=0)


def neighbours(map_SHW: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """What stands beside every pixel, [S, H, W] a neighbour: 8 for the first distance, then those of the next."""
    height, width = map_SHW.shape[1:]
    for far in dilations:
        padded = functional.pad(map_SHW[None], (far,) * 4, mode="replicate")[0]
        for y, x in _AROUND:
            top, left = far * (1 + y), far * (1 + x)
            yield padded[:, top : top + height, left : left + width]
