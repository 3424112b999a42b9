"""docs/performance.md and benchmarks/README.md: their commands are understood, their settings exist."""

from __future__ import annotations

import re
import shlex
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_type_hints

import click
import pytest

from cosmos_fast.cli.main import command
from cosmos_fast.cli.train import resolve_config
from cosmos_fast.config import TrainConfig

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / name).read_text() for name in ("docs/performance.md", "benchmarks/README.md")}
PLACEHOLDERS = {"NAME": "demo", "N": "4"}


def commands() -> list[str]:
    """Of code blocks and of the text between."""
    found: list[str] = []
    for text in PAGES.values():
        blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
        found += [line for block in blocks for line in block.splitlines() if line.startswith("cosmos-fast ")]
        found += re.findall(r"`(cosmos-fast [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return sorted({" ".join(line.split()) for line in found})


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_pages_is_understood(line: str) -> None:
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True)[1:]]
    group: click.Command = command
    context = click.Context(command)
    while isinstance(group, click.Group) and words and words[0] != "--help":
        name = words.pop(0)
        found = group.get_command(context, name)
        assert found is not None, f"{line}: no command {name}"
        group = found
    if "--help" in words:
        return
    given = group.make_context(line, words).params
    if given.get("overrides") and given.get("recipe"):
        resolve_config(given["recipe"], None, given["overrides"])


def test_there_are_commands_to_profile_to_benchmark_and_to_find_a_batch_size() -> None:
    lines = "\n".join(commands())
    for words in ("train .*--profile ", "bench step ", "bench report", "train .*--find-batch-size"):
        assert re.search(words, f"{lines} "), words


def test_settings_of_the_pages_exist() -> None:
    text = "\n".join(PAGES.values())
    names = set(re.findall(r"`?\b((?:compute|run|data|evaluate|optimizer)(?:\.[a-z_0-9]+)+)\b(?!\()", text))
    names = {name for name in names if not name.endswith((".py", ".json", ".md"))}
    assert len(names) > 15
    for name in names:
        kind: object = TrainConfig
        for part in name.split("."):
            hints = get_type_hints(kind) if is_dataclass(kind) else {}
            assert part in hints, f"{name}: no {part}"
            kind = hints[part]
