"""Operations with several implementations behind one contract each."""

from cosmos_fast.ops.adamw_ema import adamw_ema_, grad_norm
from cosmos_fast.ops.cross_pool import PoolWeights, attention_weights, cross_attention_pool
from cosmos_fast.ops.distill import distillation_cross_entropy
from cosmos_fast.ops.distill_dense import dense_distillation_cross_entropy
from cosmos_fast.ops.infonce import infonce_terms, multiview_infonce
from cosmos_fast.ops.infonce_ranks import Columns

__all__ = [
    "Columns",
    "PoolWeights",
    "adamw_ema_",
    "attention_weights",
    "cross_attention_pool",
    "dense_distillation_cross_entropy",
    "distillation_cross_entropy",
    "grad_norm",
    "infonce_terms",
    "multiview_infonce",
]
