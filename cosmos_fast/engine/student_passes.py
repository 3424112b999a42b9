"""The student as DeepSpeed wants a module: tensors out, autocast inside."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cosmos_fast.engine.precision import Precision
from cosmos_fast.model import CosmosFeatures, CosmosModel

_PLAIN = ("image", "text", "logit_scale")  # of CLIP, which has no others
_ALL = ("image", "text", "image_crossmodal", "text_crossmodal", "logit_scale", "distill_logit_scale")


class StudentPasses(nn.Module):
    """The student's forward pass in the precision of the run."""

    def __init__(self, student: CosmosModel, precision: Precision) -> None:
        super().__init__()
        self.student, self._precision = student, precision

    def forward(self, images: list[Tensor], texts_VBL: Tensor) -> tuple[Tensor, ...]:
        """What `features_of` understands."""
        with self._precision.autocast():
            found = self.student(images, texts_VBL)
        return tuple(value for name in _ALL if (value := getattr(found, name)) is not None)


def features_of(tensors: Sequence[Tensor]) -> CosmosFeatures:
    """The features that a forward pass gave as tensors."""
    names = _ALL if len(tensors) == len(_ALL) else _PLAIN
    return CosmosFeatures(**{**dict.fromkeys(_ALL), **dict(zip(names, tensors, strict=True))})  # type: ignore[arg-type]
