"""The layout of the released COSMOS files: `epoch`, `name`, `student`, `teacher`, with the original's names inside; and
`model`, the architecture, whose heads the shapes do not tell."""

from __future__ import annotations

from pathlib import Path

import torch

from cosmos_fast.exchange.source import Source
from cosmos_fast.utils.errors import UserError


def write(source: Source, path: Path) -> None:
    """A file for `torch.load(weights_only=True)`. It has no `optimizer`: ours keeps its state in another form."""
    described = next(iter(source.models.values())).config.to_openclip()
    if any(model.config.to_openclip() != described for model in source.models.values()):
        raise UserError("student and teacher are of two architectures: choose --weights student or teacher")
    weights = {name: model.reference_state_dict() for name, model in source.models.items()}
    try:
        with path.open("wb") as file:  # given a path, torch names the archive after it, and equal weights differ
            torch.save({"epoch": source.epoch, "name": source.name, "model": described} | weights, file)
    except RuntimeError as error:  # what torch makes of a disk that takes no more
        raise OSError(f"the disk took no more: {str(error).splitlines()[0]}") from error
