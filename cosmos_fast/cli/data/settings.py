"""Settings of a training run for commands that look at data: a recipe or a file, changes, and other sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import click

from cosmos_fast.config import SourceConfig, TrainConfig, load_config
from cosmos_fast.recipes import get_recipe
from cosmos_fast.utils.errors import UserError

_OPTIONS = (
    click.option("--recipe", metavar="NAME", help="Settings of a recipe; see `cosmos-fast train --list-recipes`."),
    click.option("--config", "config_file", metavar="FILE", help="Settings of a file, such as a run's config.yaml."),
    click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a setting; repeatable."),
)


def takes_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the options --recipe, --config and --set, for resolve_settings()."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def resolve_settings(
    recipe: str | None, config_file: str | None, overrides: Sequence[str] = (), paths: Sequence[str] = ()
) -> TrainConfig:
    """The configuration; without recipe and file the defaults, ViT-B/16. paths: sources in place of data.train.

    UserError: recipe and file both, a wrong setting, or no source in either.
    """
    if recipe is not None and config_file is not None:
        raise UserError("--recipe and --config both name settings: give one of them")
    base = get_recipe(recipe) if recipe is not None else config_file or TrainConfig(name="defaults")
    config = load_config(base, overrides)
    if paths:
        train = tuple(SourceConfig(path=path) for path in paths)
        config = replace(config, data=replace(config.data, train=train))
    if not config.data.train:
        raise UserError("no data source: name shards, or settings with data.train (--config, --recipe, --set)")
    return config
