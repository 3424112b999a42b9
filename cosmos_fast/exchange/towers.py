"""The two encoders of a model by themselves: their weights by name, and without what only COSMOS' training uses."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from cosmos_fast.config import ModelConfig
from cosmos_fast.model.cosmos import CosmosModel
from cosmos_fast.model.weights import CROSSMODAL


def tower_weights(model: CosmosModel) -> tuple[dict[str, Tensor], ModelConfig]:
    """Weights of plain CLIP under the original's names, copies on the CPU, and its architecture.

    `encode_image` and `encode_text` need no others: the cross-modal heads are for training.
    """
    weights = model.reference_state_dict()
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(CROSSMODAL)}
    return {name: tensor.contiguous() for name, tensor in kept.items()}, replace(model.config, crossmodal=False)
