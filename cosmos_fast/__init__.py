"""cosmos-fast: a fast, memory-lean trainer for COSMOS vision-language models.

Names are imported on first use, so that `import cosmos_fast` and the command line start quickly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmos_fast.data.tokenizer import tokenize
    from cosmos_fast.loss import CosmosLoss, CosmosLossOutput
    from cosmos_fast.model import CosmosFeatures, CosmosModel, TeacherFeatures, create_model, load_checkpoint

__version__ = "0.1.0"

_HOMES = {
    "CosmosFeatures": "cosmos_fast.model",
    "CosmosLoss": "cosmos_fast.loss",
    "CosmosLossOutput": "cosmos_fast.loss",
    "CosmosModel": "cosmos_fast.model",
    "TeacherFeatures": "cosmos_fast.model",
    "create_model": "cosmos_fast.model",
    "load_checkpoint": "cosmos_fast.model",
    "tokenize": "cosmos_fast.data.tokenizer",
}
_SUBPACKAGES = ("ops",)

__all__ = [
    "CosmosFeatures",
    "CosmosLoss",
    "CosmosLossOutput",
    "CosmosModel",
    "TeacherFeatures",
    "create_model",
    "load_checkpoint",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"cosmos_fast.{name}")
    raise AttributeError(f"module 'cosmos_fast' has no attribute {name!r}")
