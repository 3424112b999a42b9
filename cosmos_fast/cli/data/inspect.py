"""`cosmos-fast data inspect`: statistics of shards, and a contact sheet of images with captions."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from cosmos_fast.utils.errors import UserError


@click.command(name="inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--samples", type=click.IntRange(1, 400), default=12, show_default=True, help="Pictures on the sheet.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Contact sheet to write, PNG.  [default: inspect.png in the directory of the shards]",
)
@click.option("--limit", type=click.IntRange(1), default=5000, show_default=True, help="Samples read for statistics.")
def command(path: Path, samples: int, out: Path | None, limit: int) -> None:
    """Show what is in PATH: a directory of tar shards, a data set of `data synth`, a glob, a brace pattern or a file.

    Prints samples, member kinds, image sizes (px), captions a sample, words a sentence and bad samples by cause, and
    writes a contact sheet.
    """
    from cosmos_fast.data import inspect  # imports torch, which --help need not wait for

    indexes = inspect.open_sources(path)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=sum(min(limit, len(index)) for index in indexes))
        surveys = [inspect.survey(index, limit, lambda samples: bar.advance(task, samples)) for index in indexes]
    for found in surveys:
        click.echo(inspect.describe(found))
    sheet = out or (path if path.is_dir() else path.parent) / "inspect.png"
    cards = inspect.pick_cards(indexes, samples)
    if not cards:
        raise UserError(f"{path}: no usable sample for the contact sheet, see the causes above")
    try:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        inspect.contact_sheet(cards).save(sheet, "PNG")
    except OSError as error:
        raise UserError(f"cannot write {sheet}: {error.strerror or error}; name another file with --out") from error
    click.echo(f"contact sheet of {len(cards)} samples: {sheet}")
