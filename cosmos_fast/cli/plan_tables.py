"""What `cosmos-fast plan` shows: tables for people, and the same as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from cosmos_fast.config import TrainConfig
from cosmos_fast.config.deepspeed import offloads_optimizer
from cosmos_fast.engine.plan import Assumptions, Forecast, best_stage, refused_stages

NOTE = "A model, not a measurement: counted work, bytes and memory, at the assumed rates below."
_OFFLOADED = (
    "offload_optimizer: what it keeps in the host's memory is left out of a rank's; its time is not part of the model."
)
_FP8 = "compute.linear=fp8: timed at the rate of {precision}; what 8 bits save is not part of the model."
_SECONDS_AN_HOUR = 3600
_WIDTH = 118


def show(config: TrainConfig, gpu: str, rates: Assumptions, gpus_per_node: int, stages: Sequence[Forecast]) -> None:
    """Every ZeRO stage on one number of GPUs, and the best of them in detail."""
    console, best = _console(), best_stage(stages)
    layout = best.layout
    nodes = -(-layout.ranks // gpus_per_node)
    servers = f"{nodes} server{'s' if nodes > 1 else ''} of {min(gpus_per_node, layout.ranks)}"
    samples = f"{layout.global_batch} samples a step, in {layout.precision}"
    _print(console, f"{config.name} on {layout.ranks} x {gpu} ({servers}), {samples}")
    _print(console, NOTE)
    table = _table(None, "ZeRO stage", *_HEADINGS)
    for one in stages:
        table.add_row(f"{one.layout.stage}{' *' if one is best else ''}", *_cells(one, config))
    console.print(table)
    for line in _remarks(config, best):
        _print(console, line)
    console.print(_memory(stages))
    console.print(_time(best))
    console.print(_communication(best))
    console.print(_assumptions(rates))


def show_several(
    config: TrainConfig,
    gpu: str,
    rates: Assumptions,
    found: Mapping[int, Sequence[Forecast]],
    left_out: Sequence[int],
) -> None:
    """The best stage of each number of GPUs."""
    console = _console()
    bests = [best_stage(stages) for stages in found.values()]
    layout = bests[0].layout
    _print(console, f"{config.name} on {gpu}, {layout.global_batch} samples a step, in {layout.precision}")
    _print(console, NOTE)
    table = _table(None, "GPUs", "stage", *_HEADINGS)
    for one in bests:
        table.add_row(f"{one.layout.ranks}", f"{one.layout.stage}", *_cells(one, config))
    console.print(table)
    for line in _not_modelled(config, bests):
        _print(console, line)
    if left_out:
        numbers = ", ".join(map(str, left_out))
        _print(console, f"left out: {numbers} GPUs, among which {layout.global_batch} samples do not divide evenly")
    console.print(_assumptions(rates))


def to_json(
    config: TrainConfig, gpu: str, rates: Assumptions, gpus_per_node: int, found: Mapping[int, Sequence[Forecast]]
) -> dict[str, Any]:
    """Everything that the tables are made of; units in the names."""
    assumptions = {
        name: {"value": value, "unit": unit, "source": source} for name, value, unit, source in rates.described()
    }
    rows = [{**_values(one, config), "best": one is best_stage(stages)} for stages in found.values() for one in stages]
    return {
        "note": " ".join([NOTE, *_not_modelled(config, [one for stages in found.values() for one in stages])]),
        "name": config.name,
        "gpu": gpu,
        "gpus_per_node": gpus_per_node,
        "assumptions": assumptions,
        "layouts": rows,
    }


def _values(one: Forecast, config: TrainConfig) -> dict[str, Any]:
    ranks = one.layout.ranks
    return {
        **asdict(one.layout),
        "global_batch": one.layout.global_batch,
        "fits": one.fits,
        "memory_gib": {**one.memory_gib, "total": one.total_gib, "limit": one.limit_gib},
        "compute_ms": one.compute_ms,
        "transfers": [
            {**asdict(transfer), "received_bytes": transfer.received_bytes(ranks), "ms": ms}
            for transfer, ms in zip(one.transfers, one.transfer_ms, strict=True)
        ],
        "received_bytes": one.received_bytes(),
        "loss_received_bytes": one.received_bytes("loss"),
        "original_loss_received_bytes": one.original_loss_bytes,
        "exposed_ms": one.exposed_ms,
        "step_ms": one.step_ms,
        "samples_per_s": one.samples_per_s,
        "mfu_pct": one.mfu_pct,
        "hours": hours(one, config),
    }


def hours(one: Forecast, config: TrainConfig) -> float | None:
    """Of the whole run; None where the configuration does not say how long it is."""
    run, samples = config.run, config.data.samples_per_epoch
    if run.max_steps is not None:
        total: float = run.max_steps * one.layout.global_batch
    elif run.epochs is not None and samples is not None:
        total = run.epochs * samples
    else:
        return None
    return total / one.samples_per_s / _SECONDS_AN_HOUR


_HEADINGS = (
    "batch",
    "memory, GiB",
    "step, ms",
    "hidden / sent, ms",
    "sent, MB",
    "samples/s",
    "a GPU",
    "MFU, %",
    "hours",
)


def _cells(one: Forecast, config: TrainConfig) -> list[str]:
    layout, sent_ms = one.layout, sum(one.transfer_ms)
    batch = f"{layout.batch_size}" + (f" x {layout.accumulate_steps}" if layout.accumulate_steps > 1 else "")
    total = hours(one, config)
    return [
        batch,
        f"{one.total_gib:,.1f}" + ("" if one.fits else f" > {one.limit_gib:,.1f}"),
        f"{one.step_ms:,.1f}",
        f"{sent_ms - one.exposed_ms:,.1f} / {sent_ms:,.1f}",
        f"{one.received_bytes() / 1e6:,.0f}",
        f"{one.samples_per_s:,.0f}",
        f"{one.samples_per_s / layout.ranks:,.0f}",
        f"{one.mfu_pct:.1f}",
        "" if total is None else f"{total:,.1f}",
    ]


def _remarks(config: TrainConfig, best: Forecast) -> list[str]:
    layout = best.layout
    lines = []
    saving = {"none": "mlp", "mlp": "blocks"}.get(config.compute.checkpoint_activations)
    less = f"; --set compute.checkpoint_activations={saving} takes less memory" if saving else ""
    if not best.fits:
        lines.append(f"No stage fits {best.limit_gib:.1f} GiB: more GPUs or a smaller batch are needed{less}.")
    elif layout.accumulate_steps > 1:
        lines.append(
            f"{layout.rank_samples} samples a rank do not fit at once: run.batch_size={layout.batch_size} "
            f"run.accumulate_steps={layout.accumulate_steps}{less}."
        )
    if layout.losses > 1:
        lines.append(
            f"A loss holds {layout.loss_batch} samples against each other; all {layout.global_batch}: "
            "--set run.negatives=all."
        )
    lines += _not_modelled(config, [best])
    lines.append(f"Each rank's loader has to bring {best.samples_per_s / layout.ranks:,.0f} samples/s.")
    return lines


def _not_modelled(config: TrainConfig, found: Sequence[Forecast]) -> list[str]:
    """Stages that `train` refuses, which are left out, and settings whose effect on time is not known."""
    ranks = max(one.layout.ranks for one in found)
    lines = [f"left out: stage {stage} ({why})" for stage, why in refused_stages(config, ranks).items()]
    if config.compute.linear == "fp8":
        lines.append(_FP8.format(precision=found[0].layout.precision))
    return [*lines, _OFFLOADED] if offloads_optimizer(config) else lines


def _memory(stages: Sequence[Forecast]) -> Table:
    table = _table("memory of a rank, GiB", "", *(f"stage {one.layout.stage}" for one in stages))
    for name in stages[0].memory_gib:
        table.add_row(name, *(f"{one.memory_gib[name]:,.2f}" for one in stages))
    table.add_section()
    table.add_row("sum", *(f"{one.total_gib:,.2f}" for one in stages))
    return table


def _time(best: Forecast) -> Table:
    table = _table(f"time of a step, stage {best.layout.stage}", "", "ms")
    for phase, ms in best.compute_ms.items():
        if ms:
            table.add_row(phase, f"{ms:,.2f}")
    table.add_row("communication, not hidden", f"{best.exposed_ms:,.2f}")
    table.add_section()
    table.add_row("sum", f"{best.step_ms:,.2f}")
    return table


def _communication(best: Forecast) -> Table:
    title = f"what a rank receives in a step, stage {best.layout.stage}"
    table = _table(title, "", "collective", "calls", "MB", "ms", "beside")
    for one, ms in zip(best.transfers, best.transfer_ms, strict=True):
        received = f"{one.received_bytes(best.layout.ranks) / 1e6:,.2f}"
        table.add_row(one.purpose, one.kind, f"{one.calls}", received, f"{ms:,.3f}", one.beside)
    if best.transfers:
        loss = best.received_bytes("loss") / 1e6
        table.add_section()
        table.add_row("losses together", "", "", f"{loss:,.2f}", "", "")
        original = f"{best.original_loss_bytes / 1e6:,.2f}"
        table.add_row("the original's losses", "", f"{best.original_gathers}", original, "", "")
    return table


def _assumptions(rates: Assumptions) -> Table:
    table = _table("assumed (--assume NAME=VALUE)", "name", "value", "unit", "source")
    for column in (2, 3):
        table.columns[column].justify = "left"
    for name, value, unit, source in rates.described():
        table.add_row(name, f"{value:g}", unit, source)
    return table


def _table(title: str | None, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _console() -> Console:
    """As wide as the tables are, also where the output is a file."""
    console = Console()
    return console if console.width >= _WIDTH else Console(width=_WIDTH)


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False, emoji=False)
