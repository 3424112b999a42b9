"""`cosmos-fast train --profile`: runs the profiler on a configuration, and shows what it found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from cosmos_fast.config import TrainConfig

if TYPE_CHECKING:
    from cosmos_fast.engine.profiler import Profile

DEFAULT_STEPS = 10
SHOWN_OPERATORS = 10


def profile(config: TrainConfig, steps: int) -> None:
    """Profile a run from fresh weights; writes <run folder>/profile/ and leaves all else as it is."""
    from cosmos_fast.data.loader import build_loader
    from cosmos_fast.engine.out_of_memory import out_of_memory_explained
    from cosmos_fast.engine.precision import resolve_device, resolve_precision
    from cosmos_fast.engine.profiler import profile_run
    from cosmos_fast.engine.run_folder import RunPlan
    from cosmos_fast.engine.trainer import Trainer
    from cosmos_fast.utils.phases import PhaseTimer

    device = resolve_device(config.run.device)
    plan = RunPlan(Path(config.run.out_dir) / config.name)
    timer = PhaseTimer(device)
    loader = build_loader(
        config.data,
        image_size=config.model.vision.image_size,
        context_length=config.model.text.context_length,
        seed=config.seed,
        batch_size=config.run.batch_size,
        device=device,
        image_dtype=resolve_precision(config.run.precision, device).image_dtype,
    )
    try:
        with out_of_memory_explained(config):
            trainer = Trainer(config, loader, plan=plan, clock=timer)
            found = profile_run(trainer, timer, steps, plan.folder / "profile")
    finally:
        loader.close()
    show(found, plan.folder / "profile")


def show(found: Profile, folder: Path, console: Console | None = None) -> None:
    """Print the ledger, the rates, the operators and the files."""
    console = console or Console()
    ledger = found.ledger
    table = Table(title=f"{ledger.steps} steps on {found.device}, {found.precision}", title_justify="left")
    table.add_column("phase")
    for heading in ("ms a step", "%"):
        table.add_column(heading, justify="right")
    for phase, ms in ledger.phase_ms.items():
        if ms or phase in ("data", "communication"):
            table.add_row(phase, f"{ms:,.1f}", f"{ledger.share_pct(phase):.1f}")
    table.add_section()
    table.add_row("wall", f"{ledger.wall_ms:,.1f}", "100.0")
    console.print(table)
    for line in _rates(found):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_operators(found))
    for line in _files(found, folder):
        click.echo(line)


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
