"""Training objectives."""

from cosmos_fast.loss.objective import ClipLoss, CosmosLoss, CosmosLossOutput, TeacherAhead, build_objective

__all__ = ["ClipLoss", "CosmosLoss", "CosmosLossOutput", "TeacherAhead", "build_objective"]
