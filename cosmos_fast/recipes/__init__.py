"""Recipes: functions that return a TrainConfig."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from cosmos_fast.config import TrainConfig
from cosmos_fast.recipes.demo import demo, demo_clip
from cosmos_fast.recipes.published import PUBLISHED
from cosmos_fast.utils.errors import UserError

RECIPES: dict[str, Callable[[], TrainConfig]] = {"demo": demo, "demo_clip": demo_clip, **PUBLISHED}

__all__ = ["RECIPES", "get_recipe"]


def get_recipe(name: str) -> TrainConfig:
    """The configuration of one recipe."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
        raise UserError(f"recipe {name!r} does not exist: did you mean {near!r}? `train --list-recipes` shows all")
    return RECIPES[name]()
