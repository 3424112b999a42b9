"""From JPEGs in shards to batches: the PIL and the DALI loader against the original's way, and a step fed by them.

The original cuts, flips and recolours each of the eight views by PIL, one after the other, and tokenizes caption by
caption in Python; the same numbers give the same crops and ids on all sides, or nothing is timed. Pictures have the
spectrum of photographs. `cpu_ms_per_sample`: processor time of all processes and threads, so its inverse is samples a
second and core. `stage_ms`: where a sample's time goes. `stall_pct`: share of its time that a training step waits.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import torch

from benchmarks import fed_step, loader_gpu, loader_parts, parts, rows
from benchmarks.harness import MIN_REPEATS
from benchmarks.loader_setting import Setting, missing_loaders
from benchmarks.rows import Row
from cosmos_fast.cli.main import run
from cosmos_fast.utils.errors import UserError

LOADERS = ("pil", "dali")
SAMPLES = {"cpu": 96, "cuda": 256}
BATCH = {"cpu": 16, "cuda": 256}


def plan(setting: Setting, loaders: Sequence[str], workers: int, repeats: int) -> Iterator[parts.Part]:
    """What is measured, in order."""
    host = replace(setting, device="cpu", machine=setting.device, batch=min(setting.batch, BATCH["cpu"]))
    if setting.device == "cpu":
        yield "per core", partial(loader_parts.measure_cores, host, loaders, repeats)
        yield "all cores", partial(loader_parts.measure_rates, host, loaders, workers, repeats)
    else:
        yield "on the GPU", partial(loader_gpu.measure, setting, loaders, workers)
        if "dali" in loaders:
            yield "on the GPU, by part", partial(loader_gpu.measure_parts, setting)
    fed = loaders if setting.device == "cpu" else loaders[-1:]  # a GPU's host is too slow for PIL: minutes of waiting
    for loader in fed:
        yield f"fed step, {loader}", partial(fed_step.measure, setting, loader, workers, repeats)
    for name in ("original", *loaders):
        yield f"stages, {name}", partial(loader_parts.measure_stages, host, name)


def usable_loaders(only: str | None, device: str) -> list[str]:
    """The loaders to measure; says which cannot run here, and why."""
    missing = missing_loaders(device)
    wanted = [name for name in LOADERS if only in (None, name)]
    for name in wanted:
        if name in missing:
            click.echo(f"left out: {missing[name]}")
    usable = [name for name in wanted if name not in missing]
    if not usable:
        raise UserError(f"--only {only}: that loader cannot run here, see above")
    return usable


def draw(found: list[Row], folder: Path) -> None:
    """The picture, where matplotlib is."""
    try:
        from benchmarks import loader_plots
    except ImportError as error:
        click.echo(f"left out: picture: {error}")
        return
    if path := loader_plots.draw(found, folder):
        click.echo(f"wrote {path}")


@click.command(name="loader", help=__doc__, context_settings={"show_default": True})
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where batches go.")
@click.option("--batch", type=click.IntRange(1), help="Samples of a batch; default: 16 on a CPU, 256 on a GPU.")
@click.option("--samples", type=click.IntRange(2), help="Samples in the shards; default: 96 on a CPU, 256 on a GPU.")
@click.option("--width", type=click.IntRange(16), default=500, help="Of the pictures, pixels.")
@click.option("--height", type=click.IntRange(16), default=375, help="Of the pictures, pixels.")
@click.option("--workers", type=click.IntRange(1), help="Loader processes; default: as many as there are cores.")
@click.option("--repeats", type=click.IntRange(MIN_REPEATS), default=MIN_REPEATS, help="Timed repetitions.")
@click.option("--only", type=click.Choice(LOADERS), help="One loader; default: both, where DALI is installed.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; default: results folder.")
def command(
    device: str,
    batch: int | None,
    samples: int | None,
    width: int,
    height: int,
    workers: int | None,
    repeats: int,
    only: str | None,
    out: Path | None,
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here, use cpu")
    from benchmarks.input_shards import write_shards
    from cosmos_fast.cli.data.synth import usable_cores

    loaders = usable_loaders(only, device)
    count = samples or SAMPLES[device]
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as folder:
        click.echo(f"making {count} pictures of {width} x {height} pixels")
        write_shards(Path(folder), count, width=width, height=height)
        setting = Setting(
            folder=folder, samples=count, width=width, height=height, batch=batch or BATCH[device], device=device
        )
        found = parts.measure(plan(setting, loaders, workers or usable_cores(), repeats), out)
    draw(found, out.parent if out else rows.RESULTS / rows.slug(found[0].device))


if __name__ == "__main__":
    sys.exit(run(command, name="bench loader"))
