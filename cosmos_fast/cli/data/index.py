"""`cosmos-fast data index`: build the index of shards once, before many processes need it, and show what it holds."""

from __future__ import annotations

import click
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

from cosmos_fast.cli.data.settings import resolve_settings, takes_settings
from cosmos_fast.config import SourceConfig
from cosmos_fast.data.index import Index, open_source
from cosmos_fast.data.index_summary import summarize
from cosmos_fast.data.storage import Storage
from cosmos_fast.data.transport import shown

_FAULTS_SHOWN = 10


@click.command("index")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@takes_settings
@click.option("--rebuild", is_flag=True, help="Scan the shards again even if a fitting index is cached.")
@click.option("--allow-pipe", is_flag=True, help="Run the shell commands of pipe: sources.")
def command(
    paths: tuple[str, ...],
    recipe: str | None,
    config_file: str | None,
    overrides: tuple[str, ...],
    rebuild: bool,
    allow_pipe: bool,
) -> None:
    """Index webdataset tar shards: build (or find) the cache and show samples, members and faults.

    PATH, in place of data.train, is a directory of .tar shards, a glob, a brace pattern such as
    'cc3m/{00000..00575}.tar', one file, or a URL (http, https, s3, and what fsspec reads), of which the headers of the
    shards are read. The index is cached beside the shards, or in $COSMOS_CACHE_DIR (default ~/.cache/cosmos-fast) where
    that is read-only, and built again when a shard's size or time changes. Training finds it by itself.
    """
    data = resolve_settings(recipe, config_file, overrides, paths).data
    storage = Storage(data.remote, allow_pipe=data.allow_pipe or allow_pipe)
    console = Console(markup=False, emoji=False)  # paths, keys and extensions come from anywhere
    for source in data.train:
        show(open_with_progress(source, rebuild=rebuild, storage=storage), console)


def open_with_progress(
    source: SourceConfig, *, rebuild: bool = False, whole: bool = False, storage: Storage | None = None
) -> Index:
    """open_source() behind a progress bar on stderr."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), *Progress.get_default_columns()[1:])
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"indexing {shown(source.path)}", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return open_source(source, on_shard=advance, rebuild=rebuild, whole=whole, storage=storage)


def show(index: Index, console: Console) -> None:
    """Print the summary of one source."""
    summary = summarize(index)
    console.print(
        f"{shown(index.source.path)}: {summary.samples:,} samples in {summary.shards:,} shards",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"index: {index.cache or 'not cached, no writable place'}", highlight=False, soft_wrap=True)
    table = Table("member", "count", "MiB", "mean KiB")
    for extension, (count, size) in sorted(summary.members.items()):
        table.add_row(extension, f"{count:,}", f"{size / 2**20:,.1f}", f"{size / 2**10 / count:,.1f}")
    console.print(table)
    if index.left_out:
        console.print(f"in quarantine, left out: {index.left_out:,}", highlight=False)
    for cause, count in summary.faults.items():
        console.print(f"{cause}: {count:,}", highlight=False)
    for fault in index.faults[:_FAULTS_SHOWN]:
        console.print(f"  {fault}", highlight=False, soft_wrap=True)
    if len(index.faults) > _FAULTS_SHOWN:
        console.print(f"  ... and {len(index.faults) - _FAULTS_SHOWN:,} more", highlight=False)
