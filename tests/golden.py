"""Golden tensors: what the original computed on random weights.

Every `*.safetensors` of the folder named by `COSMOS_GOLDEN_DIR` is tested (default: `tests/data/golden`).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

DATA = Path(__file__).parent / "data"
GOLDEN_DIR = Path(os.environ.get("COSMOS_GOLDEN_DIR") or DATA / "golden")
GOLDEN_FILES = sorted(GOLDEN_DIR.glob("*.safetensors"))


@dataclass(frozen=True)
class Golden:
    """One golden file; `cfg` and `hyper` are its metadata."""

    tensors: dict[str, Tensor]
    cfg: dict[str, Any]
    hyper: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Golden:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata()
        return cls(tensors, json.loads(metadata["cfg"]), json.loads(metadata["hyper"]))

    def part(self, prefix: str) -> dict[str, Tensor]:
        """All tensors under a prefix, without it."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    def images(self, prefix: str) -> list[Tensor]:
        """The crops of one batch, one tensor a view."""
        crops = self.part(f"{prefix}image.")
        return [crops[str(view)] for view in range(len(crops))]


def assert_close_to_max(actual: Tensor, expected: Tensor, rtol: float, name: str) -> None:
    """Largest error against the largest entry: tiny gradients beside large ones carry rounding of the large ones."""
    assert actual.shape == expected.shape, name
    error = (actual - expected).abs().max()
    bound = rtol * expected.abs().max() + 1e-9
    assert error <= bound, f"{name}: error {error:.3g} over {bound:.3g}"


def without_key_bias(name: str, tensor: Tensor) -> Tensor:
    """Drop the key third of a packed projection bias.

    A key bias cancels in the softmax: its gradient is zero but for rounding, which AdamW scales up to whole steps.
    """
    if not name.endswith("in_proj_bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])
