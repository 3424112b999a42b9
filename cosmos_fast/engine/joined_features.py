"""Features of several micro-batches as those of one batch, cut off from the graphs that made them.

Axes: V views, B samples of one micro-batch, N samples of all, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from cosmos_fast.model import CosmosFeatures, TeacherFeatures

_FEATURES = ("image", "text", "image_crossmodal", "text_crossmodal")
_SCALES = ("logit_scale", "distill_logit_scale")
assert {*_FEATURES, *_SCALES} == {field.name for field in fields(CosmosFeatures)}


class JoinedFeatures:
    """`features`: [V, N, D] leaves that gather gradients, and the scales likewise.

    parts: what the student made of each micro-batch, in order; with or without a graph, sizes may differ.
    """

    features: CosmosFeatures

    def __init__(self, parts: Sequence[CosmosFeatures]) -> None:
        self._sizes = [part.image.shape[1] for part in parts]
        leaves: dict[str, Any] = {name: _join([getattr(part, name) for part in parts]) for name in _FEATURES}
        leaves |= {name: _leaf(getattr(parts[-1], name)) for name in _SCALES}
        self.features = CosmosFeatures(**leaves)

    def backward(self, part: CosmosFeatures, index: int, run: Callable[..., None] = torch.autograd.backward) -> None:
        """Send the gradients of the leaves back through the graph of a part, the one at `index`.

        The scales belong to no micro-batch: they have their gradient with the last one and zeros with the others,
        because DeepSpeed loses gradients of a parameter that is not in every pass of a step. run: called with the
        tensors of the part and their gradients.
        """
        made: list[Tensor] = []
        gradients: list[Tensor] = []
        for name in (*_FEATURES, *_SCALES):
            leaf = getattr(self.features, name)
            if leaf is None or leaf.grad is None:
                continue
            made.append(getattr(part, name))
            if name in _FEATURES:
                gradients.append(leaf.grad.split(self._sizes, dim=1)[index])
            else:
                gradients.append(leaf.grad if index == len(self._sizes) - 1 else torch.zeros_like(leaf.grad))
        run(made, gradients)


def join_teacher(parts: Sequence[TeacherFeatures | None]) -> TeacherFeatures | None:
    """The teacher's features of all micro-batches; None where there is no teacher."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    return TeacherFeatures(*(torch.cat([getattr(part, name) for part in found], dim=1) for name in ("image", "text")))


def _join(parts: list[Tensor | None]) -> Tensor | None:
    found = [part.detach() for part in parts if part is not None]
    return torch.cat(found, dim=1).requires_grad_() if found else None


def _leaf(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.detach().requires_grad_()
