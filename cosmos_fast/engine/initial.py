"""Weights that a run begins with, from a file instead of chance."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from cosmos_fast.config import ModelConfig, TextConfig, TrainConfig, VisionConfig
from cosmos_fast.model import CosmosModel, load_checkpoint
from cosmos_fast.model.weights import CROSSMODAL
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.logging import get_logger

_log = get_logger(__name__)


def start_from(config: TrainConfig, student: CosmosModel, teacher: CosmosModel) -> None:
    """Give both models the weights of `config.init`; without one they stay as they are.

    Plain CLIP's weights leave COSMOS' cross-modal heads as they are, fresh; plain CLIP leaves them out of COSMOS'.

    Raises:
        UserError: the file cannot be read, or is of another architecture.
    """
    path = config.init.path
    if path is None:
        return
    given = load_checkpoint(Path(path), config.init.weights)
    difference = _difference(config.model, given.config)
    if difference is not None:
        raise UserError(f"init.path={path} is of another architecture: {difference}")
    weights = _merged(given.state_dict(), student.state_dict())
    for model in (student, teacher):
        model.load_reference_state_dict(weights)
    heads = ""
    if config.model.crossmodal != given.config.crossmodal:
        heads = "; cross-modal heads begin fresh" if config.model.crossmodal else "; its cross-modal heads are left out"
    _log.info("student and teacher begin with the weights of %s%s", path, heads)


def _merged(given: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The given weights; cross-modal heads only where both have them, else the own ones."""
    return {
        name: given.get(name, tensor) if name.startswith(CROSSMODAL) else given[name] for name, tensor in own.items()
    }


def _difference(wanted: ModelConfig, given: ModelConfig) -> str | None:
    """The first setting in which two architectures disagree."""
    pairs: list[tuple[str, ModelConfig | VisionConfig | TextConfig, ModelConfig | VisionConfig | TextConfig]] = [
        ("model", wanted, given),
        ("model.vision", wanted.vision, given.vision),
        ("model.text", wanted.text, given.text),
    ]
    passed = {"vision", "text", "crossmodal"}
    if not (wanted.crossmodal and given.crossmodal):  # the heads are not taken
        passed.add("pool_heads")
    for where, one, other in pairs:
        for name, value in vars(one).items():
            if name not in passed and value != getattr(other, name):
                return f"its {where}.{name} is {getattr(other, name)}, here it is {value}"
    return None
