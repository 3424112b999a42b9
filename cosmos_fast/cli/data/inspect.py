"""`cosmos-fast data inspect`: statistics of shards, and samples as the model sees them, as a picture and a page."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import Progress

from cosmos_fast.cli.data.settings import resolve_settings, takes_settings
from cosmos_fast.utils.errors import UserError

if TYPE_CHECKING:
    from cosmos_fast.data.index import Index


@click.command(name="inspect")
@click.argument("path")
@takes_settings
@click.option("--samples", type=click.IntRange(1, 400), default=12, show_default=True, help="Samples on the sheet.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Contact sheet to write, PNG; the page goes beside it.  [default: inspect.png in the directory of the shards, "
    "in the working directory where that is read-only]",
)
@click.option("--limit", type=click.IntRange(1), default=5000, show_default=True, help="Samples read for statistics.")
def command(
    path: str,
    recipe: str | None,
    config_file: str | None,
    overrides: tuple[str, ...],
    samples: int,
    out: Path | None,
    limit: int,
) -> None:
    """Show what is in PATH: a directory of shards, a data set of `data synth`, a glob, a brace pattern, a file, a URL.

    Prints samples, members, image formats and sizes (px), sentences a sample, words and tokens a sentence, tokens of
    the captions that training draws, and bad samples by cause. Writes a contact sheet (PNG) and a page (HTML) with all
    of it: crops and captions are those of the first epoch of a run.
    """
    from cosmos_fast.cli.data.index import open_with_progress
    from cosmos_fast.data import contact_sheet, inspect, inspect_page  # imports torch, which --help need not wait for
    from cosmos_fast.data.storage import Storage
    from cosmos_fast.data.transport import shown
    from cosmos_fast.utils.files import write_atomic

    if out is not None and out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: it names the contact sheet, a PNG; the page goes beside it")
    config = resolve_settings(recipe, config_file, overrides, (path,))
    storage = Storage.of(config.data)
    indexes = inspect.open_sources(path, storage, open_with_progress)
    sheet = out or default_sheet(path, indexes)
    _require_writable(sheet)  # before minutes of reading
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=sum(min(limit, len(index)) for index in indexes))
        surveys = [inspect.survey(index, config, limit, lambda done: bar.advance(task, done)) for index in indexes]
    for found in surveys:
        click.echo(inspect.describe(found))
    cards = contact_sheet.pick_cards(indexes, config, samples)
    if not cards:
        raise UserError(f"{shown(path)}: no usable sample for the contact sheet, see the causes above")
    try:
        write_atomic(sheet, contact_sheet.to_png(cards))
        write_atomic(sheet.with_suffix(".html"), inspect_page.render(surveys, cards, config))
    except OSError as error:
        raise _cannot_write(sheet, error) from error
    click.echo(f"contact sheet of {len(cards)} samples: {sheet}, page: {sheet.with_suffix('.html')}")


def default_sheet(path: str, indexes: list[Index]) -> Path:
    """In the directory that `path` is, else beside the first shard.

    In the working directory where that one takes no files, and for remote shards.
    """
    directory, first = Path(path).expanduser(), indexes[0].shards[0]
    beside = first.parent if isinstance(first, Path) else Path()
    sheet = (directory if directory.is_dir() else beside) / "inspect.png"
    try:
        _try_to_write(sheet)
    except OSError:
        return Path(sheet.name)
    return sheet


def _require_writable(sheet: Path) -> None:
    try:
        _try_to_write(sheet)
    except OSError as error:
        raise _cannot_write(sheet, error) from error


def _try_to_write(sheet: Path) -> None:
    sheet.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=sheet.parent):
        pass


def _cannot_write(sheet: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {sheet}: {error.strerror or error}; name another file with --out")
