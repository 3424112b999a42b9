"""`cosmos-fast eval sets`: the published evaluation sets that can be read, and the layout of each."""

from __future__ import annotations

import click


@click.command("sets")
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """List the evaluation sets that --benchmark takes; with NAME, print the files that are read of it.

    \b
    cosmos-fast eval sets
    cosmos-fast eval sets coco
    """
    from cosmos_fast.evaluate.datasets.registry import READERS, reader_of

    if name is None:
        width = max((len(known) for known in READERS), default=0)
        task_width = max((len(reader.task) for reader in READERS.values()), default=0)
        for reader in READERS.values():
            click.echo(f"{reader.name:{width}}  {reader.task:{task_width}}  {reader.title}")
        return
    reader = reader_of(name)
    click.echo(f"{reader.name}: {reader.title} ({reader.task})\n")
    click.echo(reader.layout.strip("\n"))
    click.echo(f"\ncosmos-fast eval run --checkpoint FILE --benchmark {reader.name}=ROOT --out results.json")
