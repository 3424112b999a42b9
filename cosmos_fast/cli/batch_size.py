"""`cosmos-fast train --find-batch-size`: measures what fits, and prints the setting to use."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from cosmos_fast.config import TrainConfig
from cosmos_fast.utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from cosmos_fast.engine.batch_size import BatchSizeSearch, Trial

GIB, MIB = 2**30, 2**20
# Real captions have many lengths, which cost the allocator more room than equal ones; on a CPU the loader's processes
# and the page cache need some as well.
SHARE_OF_FREE = {"cpu": 0.9, "cuda": 0.95}


def find_batch_size(config: TrainConfig, limit_gib: float | None) -> None:
    """Print a row for every size that is run; the last line of the output is the setting itself."""
    from cosmos_fast.engine.batch_size import BatchSizeSearch
    from cosmos_fast.engine.batch_trial import STEPS, measure_peak
    from cosmos_fast.engine.precision import resolve_device, resolve_precision
    from cosmos_fast.utils.timing import Stopwatch

    device = resolve_device(config.run.device)
    precision = resolve_precision(config.run.precision, device).name
    limit_bytes, origin = memory_limit(device, limit_gib)
    click.echo(f"{config.name}: {STEPS} optimizer steps on noise a row, {precision} on {device}")
    click.echo(f"limit {limit_bytes / GIB:.2f} GiB, {origin}")
    click.echo(f"{'batch':>8}{'peak, GiB':>12}{'expected':>12}{'time, s':>10}")
    watch = Stopwatch()
    search = BatchSizeSearch(
        measure=lambda size: measure_peak(config, size, limit_bytes),
        limit_bytes=limit_bytes,
        report=lambda trial: show(trial, watch.lap_ms() / 1e3),
    )
    found = search.run()
    if not found:
        raise UserError(too_large(config, precision, limit_bytes))
    summarise(config, search, found)


def memory_limit(device: torch.device, limit_gib: float | None) -> tuple[int, str]:
    """The limit in bytes, and where it comes from; refused where the device has less."""
    from cosmos_fast.utils.memory_limits import memory_limits

    try:
        limits = memory_limits(device)
    except OSError as error:
        raise UserError(f"this system does not tell how much memory it has ({error}): give --memory-limit") from None
    available = f"{limits.free / GIB:.2f} of {limits.total / GIB:.2f} GiB are free"
    if limit_gib is None:
        share = SHARE_OF_FREE[device.type]
        return int(share * limits.free), f"{share:.0%} of what is free: {available}"
    if limit_gib * GIB > limits.total:
        raise UserError(f"--memory-limit {limit_gib:g} is more than {device} has: {available}, control groups included")
    return int(limit_gib * GIB), f"by --memory-limit: {available}"


def show(trial: Trial, seconds: float) -> None:
    """One row."""
    peak = "too much" if trial.peak_bytes is None else f"{trial.peak_bytes / GIB:.3f}"
    expected = "" if trial.expected_bytes is None else f"{trial.expected_bytes / GIB:.3f}"
    click.echo(f"{trial.batch_size:8}{peak:>12}{expected:>12}{seconds:10.1f}")


def summarise(config: TrainConfig, search: BatchSizeSearch, found: int) -> None:
    """The line through the measurements, what to do where the recipe wants more, and the setting."""
    if search.line is not None:
        click.echo(f"memory = {search.line.base / GIB:.3f} GiB + {search.line.slope / MIB:.3f} MiB x batch")
    run = config.run
    if found < run.batch_size:
        steps = -(-run.batch_size * run.accumulate_steps // found)
        click.echo(
            f"for {run.batch_size * run.accumulate_steps} samples a step, find it again with "
            f"--set run.accumulate_steps={steps} --set run.negatives=all"
        )
    click.echo(f"--set run.batch_size={found}")


def too_large(config: TrainConfig, precision: str, limit_bytes: int) -> str:
    """What to change where not even one sample fits."""
    from cosmos_fast.engine.estimate import estimate
    from cosmos_fast.engine.out_of_memory import ways_to_need_less

    needs = estimate(replace(config, run=replace(config.run, batch_size=1)), precision)
    return (
        f"a batch of 1 does not fit {limit_bytes / GIB:.2f} GiB (about {needs.total_bytes / GIB:.2f} GiB by its "
        f"configuration, libraries not counted): {ways_to_need_less(config)}, or raise --memory-limit"
    )
