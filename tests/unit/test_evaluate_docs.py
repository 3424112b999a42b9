"""docs/evaluate.md: its commands are understood, its sets are those there are, its table has the released files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from cosmos_fast.cli import train
from cosmos_fast.cli.eval import command
from cosmos_fast.evaluate.datasets.registry import READERS
from cosmos_fast.evaluate.protocols import KEYS

TEXT = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text()
BLOCKS = "".join(re.findall(r"^```\n(.*?)^```", TEXT, re.M | re.S))
LINES = [shlex.split(line, comments=True) for line in BLOCKS.splitlines()]
RELEASED = [f"cosmos_vitb{p}_{d}.pt" for p in (16, 32) for d in ("cc3m", "cc12m", "yfcc15m", "merged30m", "pixelprose")]
PAPER = {
    "vitb16_cc12m": ("64.2 / 48.9", "91.4 / 76.2", "51.4"),
    "vitb32_pixelprose": ("57.2 / 38.9", "85.6 / 66.3", "54.3"),
}


def eval_arguments() -> list[list[str]]:
    """What follows `eval` in each line."""
    starts = (["cosmos-fast", "eval"], ["cosmos_fast.cli.main", "eval"])
    return [line[i + 2 :] for line in LINES for i in range(len(line)) if line[i : i + 2] in starts]


def parsed(arguments: list[str]) -> dict[str, Any]:
    name, *rest = arguments
    return command.commands[name].make_context(name, rest).params  # type: ignore[attr-defined]


def test_every_command_is_understood() -> None:
    given = [parsed(arguments) for arguments in eval_arguments()]
    named = {name for one in given for name in one.get("benchmarks", {})}
    assert named == {name for name in READERS if name not in ("captions", "wds", "coco_karpathy")}
    (arguments,) = (line[2:] for line in LINES if line[:2] == ["cosmos-fast", "train"])
    during = train.command.make_context("train", arguments).params["during_training"]
    assert {name: str(path) for name, path in during.items()} == {"coco": "/data/coco", "imagenet": "/data/imagenet"}
    assert len(LINES) == len(given) + 1


def test_each_released_file_has_a_row_of_the_paper_and_its_command() -> None:
    rows = re.findall(r"^\| ViT-B/(\d+), \S+ \| `(\S+)` \| ([\d. /]+) \| ([\d. /]+) \| ([\d.]+) \|$", TEXT, re.M)
    assert [file for _, file, *_ in rows] == RELEASED
    assert all(file.startswith(f"cosmos_vitb{patch}_") for patch, file, *_ in rows)
    found = {file[7:-3]: tuple(figures) for _, file, *figures in rows}
    assert {name: found[name] for name in PAPER} == PAPER
    whole = [one for one in map(parsed, eval_arguments()) if one.get("weights") == "both"]
    assert [Path(one["checkpoint"]).name for one in whole] == RELEASED
    assert all(set(one["benchmarks"]) == {"coco", "flickr30k", "imagenet"} for one in whole)


def test_the_page_lists_every_set_with_its_task_and_the_options() -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \| (retrieval|classification|segmentation|either) \|", TEXT, re.M))
    assert list(listed) == list(READERS)
    assert all(listed[name] in (reader.task, "either") for name, reader in READERS.items())
    assert f"read, {len(READERS)} of them" in TEXT
    (protocol,) = re.findall(r"^\| `--protocol` \|(.*)$", TEXT, re.M)
    assert set(re.findall(r"`(\w+)", protocol)) == set(KEYS)
    options = {name for option in command.commands["run"].params for name in option.opts}  # type: ignore[attr-defined]
    explained = set(re.findall(r"^\| `(--[a-z-]+)`", TEXT, re.M))
    assert options - explained == {"--checkpoint", "--benchmark", "--tasks", "--set"}


@pytest.mark.parametrize("heading", ["exchange.md#load", "monitoring.md#evaluation-on-all-ranks"])
def test_links_lead_somewhere(heading: str) -> None:
    page, _, place = heading.partition("#")
    assert f"({heading})" in TEXT
    titles = re.findall(r"^#+ (.*)$", (Path(__file__).parents[2] / "docs" / page).read_text(), re.M)
    assert place in {title.lower().replace(" ", "-") for title in titles}
