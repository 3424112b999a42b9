"""A benchmark part by part: what one part cannot do, or is killed in, costs nothing that the others measured."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import torch

from benchmarks import rows
from benchmarks.rows import Row
from cosmos_fast.utils.errors import UserError

Part = tuple[str, Callable[[], Iterable[Row]]]


def measure(parts: Iterable[Part], out: Path | None) -> list[Row]:
    """Measure the parts in order; rows are written after each, and shown at the end.

    A part that does not fit the GPU's memory is left out and named. One that fails otherwise, by a wrong result say, is
    told with its traceback, the others still run, and at the end UserError names it.
    """
    found: list[Row] = []
    failed: list[str] = []
    path = None
    for name, part in parts:
        try:
            for row in part():
                found.append(row)  # one by one: what a part had before it failed is kept
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            click.echo(f"left out: {name}: out of memory: {error}")
        except UserError:
            raise
        except Exception as error:
            traceback.print_exc()
            failed.append(f"{name} ({type(error).__name__})")
        if found:
            path = rows.write(found, out)
    if found:
        rows.show(found)
        click.echo(f"wrote {path}")
    if failed:
        raise UserError(f"{', '.join(failed)} failed; what went wrong stands above")
    if not found:
        raise UserError("nothing was measured: every part was left out")
    return found
