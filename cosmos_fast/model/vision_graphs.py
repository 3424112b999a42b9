"""The vision tower as CUDA graphs: its shapes repeat from step to step, and a replay is one launch, not a thousand.

A graph is captured at the second call with the same crops, number of kept patches, gradient mode and precision, forward
and backward each once (torch.cuda.make_graphed_callables); the first call is an ordinary one and fills the caches of
layouts and position matrices, which a capture must not do. Other calls stay ordinary ones. The outputs of a graph are
overwritten by its next replay, so there is one forward pass a step and model: no accumulation of gradients.

Text is left out, as its packed lengths vary. Not yet run on hardware.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cosmos_fast.model.vision import VisionOutput, VisionTower
from cosmos_fast.utils.errors import UserError

MOST_GRAPHS = 2  # a tower: each holds the activations of its shapes for good


def use_vision_graphs(tower: VisionTower, device: torch.device) -> None:
    """Let `tower`, which lies on `device`, run from graphs, in place.

    Raises:
        UserError: `device` has no CUDA graphs.
    """
    if device.type != "cuda":
        raise UserError(
            f"compute.cuda_graphs=true: CUDA graphs need a GPU, this run is on {device.type}; "
            "set compute.cuda_graphs=false"
        )
    # The instance's own `forward`, as make_graphed_callables does it: no module more, no other parameter names.
    tower.forward = VisionGraphs(tower)  # type: ignore[method-assign]


class VisionGraphs:
    """Stands in for the forward of one tower."""

    def __init__(self, tower: VisionTower) -> None:
        self._tower = tower
        self._plain: Callable[..., VisionOutput] = tower.forward
        self._calls: Counter[Any] = Counter()
        self._graphs: dict[Any, Callable[..., tuple[Tensor, ...]]] = {}

    def __call__(self, crops: list[Tensor], keep_patches: int = 0) -> VisionOutput:
        key = self._key(crops, keep_patches)
        self._calls[key] += 1
        if key not in self._graphs and self._calls[key] == 2 and len(self._graphs) < MOST_GRAPHS:
            self._graphs[key] = self._capture(crops, keep_patches)
        if key not in self._graphs:
            return self._plain(crops, keep_patches)
        features_ND, *patches = self._graphs[key](*crops)
        return VisionOutput(features_ND, patches[0] if patches else None)

    def _key(self, crops: list[Tensor], keep_patches: int) -> Any:
        shapes = tuple((crop.shape, crop.dtype) for crop in crops)
        precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        return shapes, keep_patches, torch.is_grad_enabled(), precision, self._tower.training

    def _capture(self, crops: list[Tensor], keep_patches: int) -> Callable[..., tuple[Tensor, ...]]:
        module = _TensorsOnly(self._tower, self._plain, keep_patches).train(self._tower.training)
        # A cast weight that autocast remembers would be one of another step; tensors of inference mode, in which the
        # teacher runs, could not be written to outside it.
        casts, grad = torch.is_autocast_enabled("cuda"), torch.is_grad_enabled()
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(grad),
            torch.autocast("cuda", dtype=torch.get_autocast_dtype("cuda"), enabled=casts, cache_enabled=False),
        ):
            samples = tuple(crop.detach().clone() for crop in crops)
            # The tower carries the pooler's parameters, which its own forward does not use.
            graph: Any = torch.cuda.make_graphed_callables(module, samples, allow_unused_input=True)
        return graph


class _TensorsOnly(nn.Module):
    """The tower's forward from tensors to tensors."""

    def __init__(self, tower: VisionTower, plain: Callable[..., VisionOutput], keep_patches: int) -> None:
        super().__init__()
        self.tower, self._forward, self._keep_patches = tower, plain, keep_patches

    def forward(self, *crops: Tensor) -> tuple[Tensor, ...]:
        output = self._forward(list(crops), self._keep_patches)
        return (output.features_ND,) if output.patches_MPW is None else (output.features_ND, output.patches_MPW)
