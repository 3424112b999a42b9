"""`cosmos-fast train --profile`: runs the profiler on a configuration, and shows what it found."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from cosmos_fast.cli.start_up import open_loader
from cosmos_fast.config import TrainConfig

if TYPE_CHECKING:
    from cosmos_fast.engine.profiler import Profile

DEFAULT_STEPS = 10
SHOWN_OPERATORS = 10


def profile(config: TrainConfig, steps: int) -> None:
    """Profile a run from fresh weights, on all ranks; writes <run folder>/profile/ and leaves all else as it is."""
    from cosmos_fast.engine.out_of_memory import out_of_memory_explained
    from cosmos_fast.engine.precision import resolve_device
    from cosmos_fast.engine.profiler import profile_run
    from cosmos_fast.engine.run_folder import RunPlan
    from cosmos_fast.engine.trainer import Trainer
    from cosmos_fast.utils.phases import PhaseTimer
    from cosmos_fast.utils.ranks import device_of_rank, joined_ranks

    plan = RunPlan(Path(config.run.out_dir) / config.name)
    always, waits_s = config.run.engine == "deepspeed", config.run.collective_timeout_s
    with joined_ranks(config.run.device, timeout_s=waits_s, always=always) as ranks, ExitStack() as opened:
        with ranks.together():
            device = resolve_device(device_of_rank(config.run.device, ranks))
            loader = open_loader(config, device, ranks)
            opened.callback(loader.close)
        timer = PhaseTimer(device)
        with out_of_memory_explained(config):
            trainer = Trainer(config, loader, plan=plan, ranks=ranks, clock=timer)
            found = profile_run(trainer, timer, steps, plan.folder / "profile")
    if ranks.first:
        show(found, plan.folder / "profile")


def show(found: Profile, folder: Path, console: Console | None = None) -> None:
    """Print the ledger, the rates, the operators and the files."""
    console = console or Console()
    ledger = found.ledger
    where = f"{len(found.ranks)} ranks, each on {found.device}" if found.ranks else found.device
    table = Table(title=f"{ledger.steps} steps on {where}, {found.precision}", title_justify="left")
    table.add_column("phase")
    for heading in ("mean ms a step" if found.ranks else "ms a step", "%", *(("least", "most") if found.ranks else ())):
        table.add_column(heading, justify="right")
    for phase, ms in ledger.phase_ms.items():
        if ms or phase in ("data", "communication"):
            spread = _spread([one.phase_ms[phase] for one in found.ranks])
            table.add_row(phase, f"{ms:,.1f}", f"{ledger.share_pct(phase):.1f}", *spread)
    table.add_section()
    table.add_row("wall", f"{ledger.wall_ms:,.1f}", "100.0", *_spread([one.wall_ms for one in found.ranks]))
    console.print(table)
    for line in _rates(found):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_operators(found))
    for line in _files(found, folder):
        click.echo(line)


def _spread(of_ranks: list[float]) -> list[str]:
    """The least and the most with their ranks, where there are several."""
    if not of_ranks:
        return []
    return [f"{value:,.1f} (rank {of_ranks.index(value)})" for value in (min(of_ranks), max(of_ranks))]


def _rates(found: Profile) -> list[str]:
    lines = [
        f"{found.samples_per_s:,.1f} samples/s, waiting for data {found.data_stall_pct:.1f} % of the time, "
        f"peak memory {found.peak_memory_mib / 1024:.2f} GiB",
        f"{found.flops / 1e9 / found.samples:,.2f} GFLOP a sample that the result needs, "
        f"{found.flops_unpruned / 1e9 / found.samples:,.2f} with every row of the last blocks",
        f"{found.tflops_per_s():,.3f} TFLOP/s, unpruned {found.tflops_per_s(pruned=False):,.3f}",
    ]
    mfu = found.mfu_pct()
    if found.peak is None or mfu is None:
        return [*lines, "MFU: the rate of this device at this precision is not known"]
    unpruned = found.mfu_pct(pruned=False)
    rate = f"{found.peak.flops_per_s / 1e12:,.3g} TFLOP/s, {found.peak.source}"
    return [*lines, f"MFU {mfu:.1f} %, unpruned {unpruned:.1f} %, of {rate}"]


def _operators(found: Profile) -> Table:
    table = Table(title="operators, own time over the traced steps", title_justify="left")
    table.add_column("operator", no_wrap=True)
    on_device = any(one.device_ms for one in found.operators)
    for heading in ("calls", "CPU ms", *(["GPU ms"] if on_device else [])):
        table.add_column(heading, justify="right")
    for one in found.operators[:SHOWN_OPERATORS]:
        gpu = [f"{one.device_ms:,.1f}"] if on_device else []
        table.add_row(one.name, f"{one.calls:,}", f"{one.cpu_ms:,.1f}", *gpu)
    return table


def _files(found: Profile, folder: Path) -> list[str]:
    lines = [
        f"{folder / found.files['ledger']}: these figures",
        f"{folder / found.files['trace']}: timeline with shapes and allocations, for https://ui.perfetto.dev",
    ]
    if "memory_snapshot" in found.files:
        return [*lines, f"{folder / found.files['memory_snapshot']}: for https://pytorch.org/memory_viz"]
    return [*lines, "no memory snapshot: torch takes them of CUDA memory only; the timeline has the CPU's allocations"]
