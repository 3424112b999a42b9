"""`cosmos-fast export`: weights of a checkpoint as a file that other programs read."""

from __future__ import annotations

from pathlib import Path

import click

from cosmos_fast.exchange.formats import FORMATS


@click.command("export", epilog="\n\n".join(f"{name}: {kind.summary}" for name, kind in FORMATS.items()))
@click.option("--checkpoint", type=click.Path(path_type=Path), required=True, help="Run or checkpoint folder, or file.")
@click.option(
    "--weights",
    type=click.Choice(["student", "teacher", "both"]),
    help="Which model; if not given, both where the format holds both, else the teacher.",
)
@click.option("--to", type=click.Choice(list(FORMATS)), required=True, help="The format, see below.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The file or folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier export has left at OUT.")
def command(checkpoint: Path, weights: str | None, to: str, out: Path, overwrite: bool) -> None:
    """Write the weights of a checkpoint in another format. Needs no GPU.

    OUT appears when it is whole; a failed or killed export leaves what was there before.

    \b
    cosmos-fast export --checkpoint runs/demo/cosmos --to original --out cosmos.pt
    cosmos-fast export --checkpoint runs/demo/cosmos --weights student --to safetensors --out student.safetensors
    """
    from rich.console import Console

    from cosmos_fast.exchange.export import export, size_of

    with Console(stderr=True).status("starting") as status:
        found = export(checkpoint, to, out, weights=weights, overwrite=overwrite, step=status.update)  # type: ignore[arg-type]
    click.echo(f"wrote {out}: {' and '.join(found.models)} of {found.name}, {size_of(out) / 2**20:.1f} MiB")
