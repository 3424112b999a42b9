"""`cosmos-fast data coverage`: what given numbers of ranks and workers see of the data."""

from __future__ import annotations

import click
from rich.console import Console
from rich.progress import Progress

from cosmos_fast.cli.data.index import open_with_progress
from cosmos_fast.cli.data.settings import resolve_settings, takes_settings
from cosmos_fast.data import coverage
from cosmos_fast.data.coverage import Split
from cosmos_fast.data.mixture import sample_order
from cosmos_fast.data.storage import Storage
from cosmos_fast.engine.schedules import total_steps


@click.command("coverage")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@takes_settings
@click.option("--ranks", type=click.IntRange(1), help="Processes that train.  [default: run.world_size_hint, or 1]")
@click.option("--workers", type=click.IntRange(0), help="Loader processes a rank.  [default: data.workers]")
@click.option("--batch-size", type=click.IntRange(1), help="Samples a rank and micro-batch.  [default: run.batch_size]")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), help="Length of the run.  [default: run.epochs]")
@click.option("--walk", is_flag=True, help="Check it: go through an epoch, about 15 s a million samples.")
def command(
    paths: tuple[str, ...],
    recipe: str | None,
    config_file: str | None,
    overrides: tuple[str, ...],
    ranks: int | None,
    workers: int | None,
    batch_size: int | None,
    epochs: float | None,
    walk: bool,
) -> None:
    """Say what a run on some ranks and workers sees: of each source, in an epoch, on each rank and worker.

    PATH: sources as `data index` takes them, in place of data.train. The numbers are exact; no member is read.

    \b
    cosmos-fast data coverage 'cc3m/{00000..00575}.tar' --ranks 16 --workers 8 --batch-size 64 --epochs 32
    cosmos-fast data coverage --config runs/cosmos/config.yaml --ranks 4 --walk
    """
    changes = {"data.workers": workers, "run.batch_size": batch_size, "run.epochs": epochs}
    given = [f"{key}={value}" for key, value in changes.items() if value is not None]
    given += ["run.max_steps=null"] if epochs is not None else []
    config = resolve_settings(recipe, config_file, (*overrides, *given), paths)
    run = config.run
    split = Split(ranks or run.world_size_hint or 1, config.data.workers, run.batch_size, run.accumulate_steps)
    storage = Storage.of(config.data)
    indexes = [open_with_progress(source, storage=storage) for source in config.data.train]
    order = sample_order(config.data, indexes, config.seed)
    epoch = config.data.samples_per_epoch or order.samples_per_epoch
    click.echo(coverage.describe(indexes, order, epoch, total_steps(config, epoch, split.ranks), split))
    if walk:
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("walking an epoch", total=epoch)
            found = coverage.walk(order, epoch, split, progress=lambda positions: bar.advance(task, positions))
        click.echo(coverage.describe_walk(found, order, epoch))
