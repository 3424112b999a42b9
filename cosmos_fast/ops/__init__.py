"""Operations with several implementations behind one contract each."""

from cosmos_fast.ops.adamw_ema import adamw_ema_, grad_norm
from cosmos_fast.ops.cross_pool import PoolWeights, attention_weights, cross_attention_pool
from cosmos_fast.ops.distill import distillation_cross_entropy
from cosmos_fast.ops.distill_dense import dense_distillation_cross_entropy
from cosmos_fast.ops.infonce import multiview_infonce

__all__ = [
    "PoolWeights",
    "adamw_ema_",
    "attention_weights",
    "cross_attention_pool",
    "dense_distillation_cross_entropy",
    "distillation_cross_entropy",
    "grad_norm",
    "multiview_infonce",
]
