"""What `multiview_infonce` takes.

Axes: V views, B batch, D embedding.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

OP = "multiview_infonce"


def check_arguments(
    parts: list[Tensor],
    b_VBD: Tensor,
    scale: Tensor,
    offset: int,
    operand_dtype: torch.dtype | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Refuse what does not fit together: a ValueError naming the argument, its shape, and what was expected."""
    labels = ["a_VBD"] if len(parts) == 1 else [f"a_VBD[{i}]" for i in range(len(parts))]
    if not parts:
        raise ValueError(f"{OP}: a_VBD is an empty sequence, expected at least one [views, batch, D] tensor")
    for label, features in zip([*labels, "b_VBD"], [*parts, b_VBD], strict=True):
        if features.dim() != 3 or 0 in features.shape:
            raise ValueError(f"{OP}: {label} has shape {tuple(features.shape)}, expected non-empty [views, batch, D]")
        if not features.is_floating_point():
            raise ValueError(f"{OP}: {label} has dtype {features.dtype}, expected a floating-point dtype")
    first = parts[0]
    _, batch, dim = first.shape
    for label, features in zip([*labels, "b_VBD"], [*parts, b_VBD], strict=True):
        columns = features is b_VBD and group is None
        if features.shape[2] != dim or features.shape[1] < batch or (features.shape[1] > batch and not columns):
            wanted = f"{batch} or more" if columns else str(batch)
            raise ValueError(
                f"{OP}: {label} has shape {tuple(features.shape)}, expected [views, {wanted}, {dim}] "
                f"to match {labels[0]}"
            )
        if features.dtype != first.dtype or features.device != first.device:
            raise ValueError(
                f"{OP}: {label} is {features.dtype} on {features.device}, expected {first.dtype} on {first.device} "
                f"like {labels[0]}"
            )
    if scale.dim() != 0:
        raise ValueError(f"{OP}: scale has shape {tuple(scale.shape)}, expected a scalar tensor")
    if not scale.is_floating_point() or scale.device != first.device:
        raise ValueError(f"{OP}: scale is {scale.dtype} on {scale.device}, expected a float on {first.device}")
    if operand_dtype is not None and not operand_dtype.is_floating_point:
        raise ValueError(f"{OP}: operand_dtype is {operand_dtype}, expected a floating-point dtype")
    most = b_VBD.shape[1] - batch
    if not 0 <= offset <= most:
        raise ValueError(
            f"{OP}: offset is {offset}, expected 0 to {most}: b_VBD has {b_VBD.shape[1]} columns, "
            f"{labels[0]} {batch} rows"
        )
