"""Operations with several implementations behind one contract each."""

from cosmos_fast.ops.cross_pool import PoolWeights, attention_weights, cross_attention_pool
from cosmos_fast.ops.infonce import multiview_infonce

__all__ = ["PoolWeights", "attention_weights", "cross_attention_pool", "multiview_infonce"]
