"""The model: packed towers, cross-attention pooling, weights."""

from cosmos_fast.model.checkpoints import load_checkpoint
from cosmos_fast.model.cosmos import AttentionMaps, CosmosFeatures, CosmosModel, TeacherFeatures, create_model

__all__ = ["AttentionMaps", "CosmosFeatures", "CosmosModel", "TeacherFeatures", "create_model", "load_checkpoint"]
