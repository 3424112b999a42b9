"""A click group that imports a sub-command only when it is run, so that `--help` does not wait for torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click


class LazyGroup(click.Group):
    """Sub-command `x` is `<package>.x.command`; one whose module is absent is not listed.

    summaries: name -> the line shown in the list of commands, which is printed without importing anything.
    """

    def __init__(self, name: str, *, package: str, summaries: Mapping[str, str], **settings: Any) -> None:
        super().__init__(name, **settings)
        self._package = package
        self._summaries = dict(summaries)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in self._summaries if find_spec(f"{self._package}.{name}") is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        found = import_module(f"{self._package}.{cmd_name}").command
        assert isinstance(found, click.Command), f"{self._package}.{cmd_name}.command is not a click command"
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = self.list_commands(ctx)
        if names:
            with formatter.section("Commands"):
                formatter.write_dl([(name, self._summaries[name]) for name in names])
