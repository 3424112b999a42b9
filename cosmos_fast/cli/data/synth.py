"""`cosmos-fast data synth`: synthetic scenes with captions and masks, as webdataset shards."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cosmos_fast.data.synthetic.scene import SceneSettings
from cosmos_fast.data.synthetic.writer import DatasetSettings, missing_shards, write_dataset


class _Sides(click.ParamType):
    """Lowest and highest side in pixels, written 96-192 or 128."""

    name = "PX-PX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", str(value))
        if match is None:
            self.fail(f"{value!r} is no range of pixels such as 96-192", param, ctx)
        return int(match[1]), int(match[2] or match[1])


@click.command(name="synth")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Directory to write to.")
@click.option("--train", default=4000, show_default=True, help="Training scenes.")
@click.option("--heldout", default=500, show_default=True, help="Held-out scenes, of compositions not in training.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same bytes.")
@click.option("--shard-size", default=500, show_default=True, help="Scenes a shard.")
@click.option("--min-objects", default=2, show_default=True, help="Fewest objects in a scene.")
@click.option("--max-objects", default=6, show_default=True, help="Most objects in a scene, up to 9.")
@click.option("--size", type=_Sides(), default="96-192", show_default=True, help="Range of image sides in pixels.")
@click.option("--workers", type=click.IntRange(1), default=None, help="Processes.  [default: number of cores]")
def command(
    out: Path,
    train: int,
    heldout: int,
    seed: int,
    shard_size: int,
    min_objects: int,
    max_objects: int,
    size: tuple[int, int],
    workers: int | None,
) -> None:
    """Make a data set of drawn scenes: JPEG, captions in DreamLIP's schema, instance masks.

    Writes OUT/train/*.tar, OUT/heldout/*.tar and OUT/meta.json. A run that was stopped continues with the same command;
    finished shards are kept.
    """
    scene = SceneSettings(
        seed=seed, min_objects=min_objects, max_objects=max_objects, min_side=size[0], max_side=size[1]
    )
    settings = DatasetSettings(train=train, heldout=heldout, shard_size=shard_size, scene=scene)
    todo = sum(shard.stop - shard.start for shard in missing_shards(out, settings))
    description, unit = TextColumn("{task.description}"), TextColumn("scenes")
    columns = (description, BarColumn(), MofNCompleteColumn(), unit, TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("drawing", total=todo, visible=todo > 0)
        written = write_dataset(out, settings, workers or usable_cores(), lambda scenes: bar.advance(task, scenes))
    state = f"wrote {todo} scenes in {written} shards" if written else "complete already, nothing to do"
    click.echo(f"{out}: {state} ({train} train, {heldout} held-out)")


def usable_cores() -> int:
    """Cores this process may run on, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
