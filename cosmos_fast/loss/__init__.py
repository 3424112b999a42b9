"""Training objectives."""

from cosmos_fast.loss.objective import ClipLoss, CosmosLoss, CosmosLossOutput

__all__ = ["ClipLoss", "CosmosLoss", "CosmosLossOutput"]
