"""NAME=PATH on the command line."""

from __future__ import annotations

from pathlib import Path

import click


def named_paths(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    """A callback of click: each name once."""
    found: dict[str, Path] = {}
    for text in values:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise click.BadParameter(f"{text!r} is not of the form NAME=PATH; `cosmos-fast eval sets` lists the names")
        if name in found:
            raise click.BadParameter(f"{name} is given twice: call one of them {name}:other")
        found[name] = Path(path).expanduser()
    return found
