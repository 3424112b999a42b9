"""What the tasks on published sets share: how a set is run, its texts, and checks of features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cosmos_fast.data.tokenizer import tokenize
from cosmos_fast.evaluate.encoder import Model
from cosmos_fast.evaluate.prompts import ClassSet
from cosmos_fast.evaluate.tasks import BATCH_SIZE
from cosmos_fast.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a set is run on a model, on every rank alike.

    batch_size: images a forward, which decides the last bits of features. precision: of the model's products, for the
    record. on_image: called once an image of this rank. on_text: called with so many texts, once a batch.
    """

    batch_size: int = BATCH_SIZE
    precision: str = "fp32"
    on_image: Callable[[], object] = lambda: None
    on_text: Callable[[int], object] = lambda count: None


DEFAULT = Settings()


def check_finite(features: Tensor) -> Tensor:
    """The same. UserError where a number is NaN or infinite."""
    if not features.isfinite().all():
        raise UserError(
            "the model's features hold NaN or infinite values: its weights are unusable, take another checkpoint"
        )
    return features


def counted_tokenizer(model: Model, settings: Settings) -> Callable[[list[str]], Tensor]:
    """The tokenizer at the model's context length; settings.on_text hears of every batch of texts."""

    def tokens_of(texts: list[str]) -> Tensor:
        settings.on_text(len(texts))
        return tokenize(texts, model.config.text.context_length)

    return tokens_of


def class_protocol(classes: ClassSet, ensemble: str) -> dict[str, Any]:
    """What class texts were made of, and how, with a digest by which two lists of classes can be told apart: of the
    prompts and of the wordings and classes that they belong to."""
    return {
        "classes": len(classes.classes),
        "class_set": classes.name,
        "prompts": sum(len(wording) for wordings in classes.prompts for wording in wordings),
        "prompts_sha256": hashlib.sha256(json.dumps(classes.prompts).encode()).hexdigest(),
        "ensemble": ensemble,
    }
