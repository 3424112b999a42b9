"""An eager port of the original COSMOS: the baseline that every ratio is measured against.

It computes what the original computes, with the same parameter names, and spends what the original spends: padded
captions, keys and values repeated per view, 160 separate logit matrices, a Python loop for the teacher. It is written
from a description of the original, and held to tensors that the original produced (`tests/parity/test_eager_port.py`).
It imports nothing from `cosmos_fast`, so that it can serve as an oracle for it. Do not make it faster.
"""

from benchmarks.eager_cosmos.layers import CrossAttentionPool, Transformer
from benchmarks.eager_cosmos.loss import EagerLosses, cosmos_loss, infonce
from benchmarks.eager_cosmos.model import EagerConfig, EagerCosmos, EagerFeatures
from benchmarks.eager_cosmos.step import EagerTrainer, learning_rate, parameter_groups

__all__ = [
    "CrossAttentionPool",
    "EagerConfig",
    "EagerCosmos",
    "EagerFeatures",
    "EagerLosses",
    "EagerTrainer",
    "Transformer",
    "cosmos_loss",
    "infonce",
    "learning_rate",
    "parameter_groups",
]
