"""`cosmos-fast eval compare`: result files side by side."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("compare")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--anyway", is_flag=True, help="Compare sets that differ, too, and say so.")
def command(files: tuple[Path, ...], anyway: bool) -> None:
    """Results of `eval run --out` side by side, the best of each line marked.

    A set whose questions differ from file to file is refused; other ways to ask them (class names, precision, ...) and
    other versions are named below the table.

    \b
    cosmos-fast eval compare cc3m.json cc12m.json
    """
    from cosmos_fast.cli.eval_shown import print_benchmarks
    from cosmos_fast.evaluate.comparison import compare

    found = compare(files, anyway)
    print_benchmarks("", found.groups)
    for note in found.notes:
        click.echo(note)
