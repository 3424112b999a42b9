"""Frozen, keyword-only dataclasses that decide a run, and their YAML form."""

from cosmos_fast.config.compute import ComputeConfig
from cosmos_fast.config.data import CropConfig, DaliConfig, DataConfig, SourceConfig, ViewsConfig
from cosmos_fast.config.load import dotted_names, dump_config, load_config
from cosmos_fast.config.model import NAMED_MODELS, ModelConfig, TextConfig, VisionConfig, named_model
from cosmos_fast.config.remote import RemoteConfig
from cosmos_fast.config.train import (
    EmaConfig,
    EvaluateConfig,
    InitConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "NAMED_MODELS",
    "ComputeConfig",
    "CropConfig",
    "DaliConfig",
    "DataConfig",
    "EmaConfig",
    "EvaluateConfig",
    "InitConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RemoteConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TextConfig",
    "TrainConfig",
    "ViewsConfig",
    "VisionConfig",
    "dotted_names",
    "dump_config",
    "load_config",
    "named_model",
]
