"""A model of a run's step time, memory and communication on many GPUs."""

from cosmos_fast.engine.plan.forecast import (
    Forecast,
    best_stage,
    count_parameters,
    forecast,
    refused_stages,
    stages_of,
)
from cosmos_fast.engine.plan.hardware import Assumptions, assume
from cosmos_fast.engine.plan.layout import Layout

__all__ = [
    "Assumptions",
    "Forecast",
    "Layout",
    "assume",
    "best_stage",
    "count_parameters",
    "forecast",
    "refused_stages",
    "stages_of",
]
