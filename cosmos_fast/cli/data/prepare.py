"""`cosmos-fast data prepare`: published caption tables and downloaded images into shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cosmos_fast.cli.data.synth import usable_cores
from cosmos_fast.data.prepare.layouts import LAYOUTS
from cosmos_fast.data.prepare.run import PrepareSettings, Summary, prepare
from cosmos_fast.data.prepare.tables import table_files
from cosmos_fast.utils.errors import UserError

_OUT = click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Directory to write to."
)
_WORKERS = click.option(
    "--workers", type=click.IntRange(1), default=None, help="Processes.  [default: number of cores]"
)
_IMAGES = click.option(
    "--images",
    required=True,
    metavar="PATH",
    help="Output folder of img2dataset, or a glob or brace pattern of shards.",
)
_JOIN = click.option(
    "--join",
    type=click.Choice(["url", "key"]),
    default="url",
    show_default=True,
    help="What table and images have in common.",
)


@click.group("prepare")
def command() -> None:
    """Turn downloaded data sets into shards: join captions with images, split them into sentences.

    A run that was stopped continues with the same command; finished shards are kept.
    """


@command.command("dreamlip")
@click.argument("tables", nargs=-1, required=True, metavar="TABLE...")
@_IMAGES
@_OUT
@_JOIN
@click.option("--key-column", metavar="NAME", help="Column of names for --join key.  [default: Image Path]")
@_WORKERS
def dreamlip(tables: tuple[str, ...], images: str, out: Path, join: Any, key_column: str | None, workers: int) -> None:
    """Shards of CC3M, CC12M or YFCC15M with DreamLIP's long captions.

    TABLE is DreamLIP's CSV (`Image Path` and seven caption columns), or the same as TSV or parquet.

    \b
    cosmos-fast data prepare dreamlip cc3m_3long_3short_1raw_captions_url.csv --images cc3m-images --out cc3m
    """
    _prepare_table("dreamlip", tables, images, out, join, key_column, workers)


@command.command("pixelprose")
@click.argument("tables", nargs=-1, required=True, metavar="TABLE...")
@_IMAGES
@_OUT
@_JOIN
@click.option("--key-column", metavar="NAME", help="Column of names for --join key.  [default: key]")
@_WORKERS
def pixelprose(
    tables: tuple[str, ...], images: str, out: Path, join: Any, key_column: str | None, workers: int
) -> None:
    """Shards of PixelProse.

    TABLE is one of its parquet files (`url`, `original_caption`, `vlm_caption`), a directory or glob of them, or a CSV
    or TSV made of them.

    \b
    cosmos-fast data prepare pixelprose 'pixelprose/data/*.parquet' --images pixelprose-images --out pixelprose-shards
    """
    _prepare_table("pixelprose", tables, images, out, join, key_column, workers)


@command.command("img2dataset")
@click.argument("images", metavar="FOLDER")
@_OUT
@_WORKERS
def img2dataset(images: str, out: Path, workers: int | None) -> None:
    """Shards of any download by img2dataset, with the captions it saved along.

    FOLDER is its output folder, or a glob or brace pattern of shards. DreamLIP's or PixelProse's columns
    (--save_additional_columns) are used where they are, else the one caption.

    \b
    cosmos-fast data prepare img2dataset captioned-images --out captioned
    """
    _prepare(PrepareSettings(images=images, out=out), workers)


def _prepare_table(
    layout: str,
    tables: tuple[str, ...],
    images: str,
    out: Path,
    join: Any,
    key_column: str | None,
    workers: int | None,
) -> None:
    if key_column is not None and join != "key":
        raise UserError("--key-column names the column for --join key: give that too")
    files = tuple(table_files(tables))
    settings = PrepareSettings(
        images=images, out=out, layout=LAYOUTS[layout], tables=files, join=join, key_column=key_column
    )
    _prepare(settings, workers)


def _prepare(settings: PrepareSettings, workers: int | None) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:

        def begin(what: str, amount: int) -> Callable[[int], None]:
            task = bar.add_task(what, total=amount)
            return lambda done: bar.advance(task, done)

        summary = prepare(settings, workers or usable_cores(), begin)
    _show(settings, summary)


def _show(settings: PrepareSettings, summary: Summary) -> None:
    """What is in the shards, and what is not. UserError where nothing is."""
    left_out = [
        f"{count:,} x {cause}" + (f" ({summary.examples[cause]})" if cause in summary.examples else "")
        for cause, count in summary.left_out.most_common()
    ]
    if summary.samples == 0:
        raise UserError(f"{settings.images}: no image has a caption ({'; '.join(left_out)}); check the paths")
    state = f"{summary.written_now:,} made now" if summary.written_now else "complete already, nothing to do"
    click.echo(f"{settings.out}: {summary.samples:,} samples in {summary.shards:,} shards ({state})")
    for line in left_out:
        click.echo(f"  left out {line}")
    for problem, count in summary.problems.most_common():
        click.echo(f"  in the caption table {count:,} x {problem}")
    click.echo(f"now check the images: cosmos-fast data verify {settings.out}")
