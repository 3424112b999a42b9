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
    """Print a row for every size that is run; the last line of the output is the setting itself.

    Under a launcher every size is run by all ranks together; the least of their limits holds, and the most that one of
    them needs. Rank 0 prints.
    """
    from cosmos_fast.engine.batch_ranks import SearchRanks
    from cosmos_fast.engine.batch_size import BatchSizeSearch
    from cosmos_fast.engine.batch_trial import STEPS, measure_peak
    from cosmos_fast.engine.precision import resolve_device, resolve_precision
    from cosmos_fast.utils.ranks import device_of_rank, place_of_environment
    from cosmos_fast.utils.timing import Stopwatch

    place = place_of_environment()
    device = resolve_device(device_of_rank(config.run.device, place))
    precision = resolve_precision(config.run.precision, device).name
    sharing = max(1, place.local_world_size) if device.type == "cpu" else 1
    limit_bytes, origin = memory_limit(device, limit_gib, sharing)
    ranks = SearchRanks.of(place)
    limit_bytes = min(ranks.gather(limit_bytes))
    say = click.echo if place.first else (lambda line: None)
    where = f"{place.world_size} ranks, each {precision} on" if place.world_size > 1 else f"{precision} on"
    say(f"{config.name}: {STEPS} optimizer steps on noise a row, {where} {device}")
    say(f"limit {limit_bytes / GIB:.2f} GiB{' a rank' if place.world_size > 1 else ''}, {origin}")
    say(f"{'batch':>8}{'peak, GiB':>12}{'expected':>12}{'time, s':>10}")
    watch = Stopwatch()
    search = BatchSizeSearch(
        measure=lambda size: measure_peak(config, size, limit_bytes, ranks),
        limit_bytes=limit_bytes,
        report=lambda trial: say(row(trial, watch.lap_ms() / 1e3)),
    )
    try:
        found = search.run()
    except UserError:  # all ranks have the same
        ranks.close()
        raise
    ranks.close()
    if not found:
        raise UserError(too_large(config, precision, limit_bytes))
    if place.first:
        summarise(config, search, found)


def memory_limit(device: torch.device, limit_gib: float | None, sharing: int = 1) -> tuple[int, str]:
    """The limit in bytes, and where it comes from; refused where the device has less. sharing: ranks that do."""
    from cosmos_fast.utils.memory_limits import memory_limits

    try:
        limits = memory_limits(device)
    except OSError as error:
        raise UserError(f"this system does not tell how much memory it has ({error}): give --memory-limit") from None
    available = f"{limits.free / GIB:.2f} of {limits.total / GIB:.2f} GiB are free"
    if limit_gib is None:
        share = SHARE_OF_FREE[device.type]
        origin = f"{share:.0%} of what is free: {available}" + (f", for {sharing} ranks" if sharing > 1 else "")
        return int(share * limits.free / sharing), origin
    if limit_gib * GIB * sharing > limits.total:
        raise UserError(f"--memory-limit {limit_gib:g} is more than {device} has: {available}, control groups included")
    return int(limit_gib * GIB), f"by --memory-limit: {available}"


def row(trial: Trial, seconds: float) -> str:
    """Of the table."""
    peak = "too much" if trial.peak_bytes is None else f"{trial.peak_bytes / GIB:.3f}"
    expected = "" if trial.expected_bytes is None else f"{trial.expected_bytes / GIB:.3f}"
    return f"{trial.batch_size:8}{peak:>12}{expected:>12}{seconds:10.1f}"


def summarise(config: TrainConfig, search: BatchSizeSearch, found: int) -> None:
    """The line through the measurements, how the samples of a step are divided where that matters, and the setting."""
    from cosmos_fast.engine.batch_size import split_of

    if search.line is not None:
        click.echo(f"memory = {search.line.base / GIB:.3f} GiB + {search.line.slope / MIB:.3f} MiB x batch")
    run = config.run
    samples = run.batch_size * run.accumulate_steps
    batch_size, steps = split_of(samples, found)
    setting = f"--set run.batch_size={batch_size} --set run.accumulate_steps={steps}"
    if found < run.batch_size:  # more micro-batches than were run: they take memory too
        click.echo(f"for {samples} samples a step, find it again with {setting} --set run.negatives=all")
    elif run.accumulate_steps > 1:
        click.echo(f"for {samples} samples a step: {setting}")
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
