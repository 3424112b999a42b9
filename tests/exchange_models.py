"""Small models that are handed to other programs, and what to feed them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from cosmos_fast import create_model
from cosmos_fast.config import ModelConfig, TextConfig, VisionConfig
from cosmos_fast.model.cosmos import CosmosModel

CONFIG = ModelConfig(
    embed_dim=32,
    vision=VisionConfig(image_size=32, patch_size=16, width=128, layers=2),
    text=TextConfig(context_length=12, vocab_size=60, width=64, heads=1, layers=3),
)
# Of heads that shapes do not tell, on a crop of another ratio of size and patch.
OTHER = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=48, patch_size=8, width=24, layers=1, head_width=8),
    text=TextConfig(context_length=9, vocab_size=70, width=32, heads=4, layers=2),
    pool_heads=2,
)


def write_model(file: Path, config: ModelConfig) -> CosmosModel:
    """A model in a file; none of its weights has its initial value: zeros and ones would hide a swap."""
    torch.manual_seed(3)
    model = create_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    metadata = {"format": "cosmos-fast/1", "weights": "teacher", "model": json.dumps(config.to_openclip())}
    save_file(model.state_dict(), file, metadata)
    return model


def inputs(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and captions of several lengths with start and end."""
    generator = torch.Generator().manual_seed(5)
    side, vocabulary = config.vision.image_size, config.text.vocab_size
    images = torch.randn(3, 3, side, side, generator=generator)
    tokens = torch.zeros(4, config.text.context_length, dtype=torch.int64)
    for row, length in zip(tokens, (3, 5, 7, config.text.context_length), strict=True):
        row[1 : length - 1] = torch.randint(1, vocabulary - 2, (length - 2,), generator=generator)
        row[0], row[length - 1] = vocabulary - 2, vocabulary - 1
    return images, tokens
