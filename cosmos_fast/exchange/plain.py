"""One model as a safetensors file, under the original's names; its metadata say what architecture it is."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from cosmos_fast.exchange.source import Source
from cosmos_fast.model.checkpoints import FORMAT


def write(source: Source, path: Path) -> None:
    """A file that `load_checkpoint` reads as the model it is, whatever its heads."""
    ((name, model),) = source.models.items()
    metadata = {"format": FORMAT, "weights": name, "model": json.dumps(model.config.to_openclip())}
    tensors = {key: tensor.contiguous() for key, tensor in model.reference_state_dict().items()}
    save_file(tensors, path, metadata)
