"""`cosmos-fast data verify`: read every sample in full, and put the bad ones into quarantine."""

from __future__ import annotations

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cosmos_fast.cli.data.index import open_with_progress
from cosmos_fast.cli.data.settings import resolve_settings, takes_settings
from cosmos_fast.cli.data.synth import usable_cores
from cosmos_fast.config import DataConfig, SourceConfig
from cosmos_fast.data.index import Index
from cosmos_fast.data.quarantine import Rules
from cosmos_fast.data.storage import Storage
from cosmos_fast.data.transport import shown
from cosmos_fast.data.verify import Verdict, plan, verify
from cosmos_fast.utils.errors import UserError

_NAMED = 10


@click.command("verify")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@takes_settings
@click.option("--workers", type=click.IntRange(1), default=None, help="Processes.  [default: number of cores]")
@click.option("--again", is_flag=True, help="Read also what was verified before.")
def command(
    paths: tuple[str, ...],
    recipe: str | None,
    config_file: str | None,
    overrides: tuple[str, ...],
    workers: int | None,
    again: bool,
) -> None:
    """Decode every image and read every record of shards; training leaves out the samples found bad.

    PATH: sources as `data index` takes them, in place of data.train. Samples are held to data.max_pixels,
    data.max_member_bytes and the schema of their source. The bad ones go, with the cause of each, into a quarantine
    file beside the index, never into the shards. A verification that was stopped goes on with the same command, and one
    of a source that changed reads the changed shards only.

    Exit status 2 if more than the share data.max_bad_share of a source is bad, after the quarantine was written.

    \b
    cosmos-fast data verify 'cc3m/{00000..00575}.tar' --workers 16
    cosmos-fast data verify cc3m --set data.max_bad_share=0
    """
    data = resolve_settings(recipe, config_file, overrides, paths).data
    storage = Storage.of(data)
    console = Console(markup=False, emoji=False)  # paths and keys come from anywhere
    complaints = []
    for source in data.train:
        index = open_with_progress(source, whole=True, storage=storage)
        verdict = _verify_with_progress(index, _rules(data, source), workers or usable_cores(), again)
        _show(index, verdict, console)
        if len(verdict.bad) > data.max_bad_share * verdict.samples:
            complaints.append(f"{len(verdict.bad):,} of {verdict.samples:,} samples of {shown(source.path)!r}")
    if complaints:
        raise UserError(
            f"{' and '.join(complaints)} are bad, more than data.max_bad_share={data.max_bad_share:g} allows; they are "
            "in quarantine all the same: mend the shards, or raise it"
        )


def _rules(data: DataConfig, source: SourceConfig) -> Rules:
    return Rules(source.schema, data.max_pixels, data.max_member_bytes)


def _verify_with_progress(index: Index, rules: Rules, workers: int, again: bool) -> Verdict:
    known = len(index) - sum(map(len, plan(index, rules, again)[1]))
    description, unit = TextColumn("{task.description}", markup=False), TextColumn("samples")
    columns = (description, BarColumn(), MofNCompleteColumn(), unit, TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"verifying {shown(index.source.path)}", total=len(index), completed=known)
        return verify(index, rules, workers, again=again, progress=lambda samples: bar.advance(task, samples))


def _show(index: Index, verdict: Verdict, console: Console) -> None:
    """Counts by cause, the first bad samples by name, what was wrong with the shards, and the file."""
    before = verdict.samples - verdict.read
    share = f"{100 * len(verdict.bad) / verdict.samples:.3g} %"
    lines = [
        f"{shown(index.source.path)}: {verdict.samples:,} samples, {len(verdict.bad):,} bad ({share})"
        + (f"; {before:,} were verified before" if before else "")
    ]
    lines += [f"  {cause}: {count:,}" for cause, count in verdict.causes.most_common()]
    for shard, bad in verdict.bad[:_NAMED]:
        lines.append(f"    {shard}:{bad.key}: {bad.cause}" + (f" ({bad.detail})" if bad.detail else ""))
    if len(verdict.bad) > _NAMED:
        lines.append(f"    ... and {len(verdict.bad) - _NAMED:,} more, all in the quarantine file")
    lines += [f"  lost before they could be read: {fault}" for fault in index.faults[:_NAMED]]
    if len(index.faults) > _NAMED:
        lines.append(f"  ... and {len(index.faults) - _NAMED:,} more faults of shards, see `cosmos-fast data index`")
    lines.append(f"quarantine: {verdict.quarantine}")
    for line in lines:
        printable = "".join(letter if letter.isprintable() else " " for letter in line)
        console.print(printable, highlight=False, soft_wrap=True)
