"""`cosmos-fast eval`: numbers of one checkpoint, and the report that compares two runs with chance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cosmos_fast.cli import eval_compare, eval_report, eval_sets
from cosmos_fast.cli.eval_shown import TAKES_REMOTE, TASKS, pick_device, remote_settings
from cosmos_fast.cli.named_paths import named_paths
from cosmos_fast.utils.errors import UserError

if TYPE_CHECKING:
    from cosmos_fast.cli.eval_models import Asked


@click.group("eval")
def command() -> None:
    """Measure checkpoints: retrieval, zero-shot classification and segmentation."""


def _tasks(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise click.BadParameter(f"{value!r}: give some of {','.join(TASKS)}")
    return names


def _batch_size(_: click.Context, __: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r}: give a number of images, or auto")
    return int(value)


@command.command("run")
@click.option("--checkpoint", type=click.Path(path_type=Path), required=True, help="Run or checkpoint folder, or file.")
@click.option("--weights", type=click.Choice(["teacher", "student", "both"]), default="teacher", show_default=True)
@click.option(
    "--benchmark",
    "benchmarks",
    metavar="NAME=PATH",
    multiple=True,
    callback=named_paths,
    help="A published set and its folder; repeatable. `eval sets` lists them.",
)
@click.option("--data", help="Held-out shards: directory, glob, brace pattern, file or URL.")
@click.option("--tasks", callback=_tasks, default=",".join(TASKS), show_default=True, help="Of --data, with commas.")
@click.option("--classes", type=click.Path(path_type=Path), help="Class names and templates for the one --benchmark.")
@click.option(
    "--protocol",
    metavar="KEY=VALUE",
    multiple=True,
    help="Of segmentation: csa=false, pamr_steps=10, scale, prob_threshold, ...; repeatable.",
)
@click.option("--max-samples", type=click.IntRange(1), help="So many samples: the first of shards, spread over a set.")
@click.option("--batch-size", callback=_batch_size, default="auto", show_default=True, help="Images a forward.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "auto"]), default="fp32", show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file for results and protocol.")
@TAKES_REMOTE
def run(
    checkpoint: Path,
    weights: str,
    benchmarks: dict[str, Path],
    data: str | None,
    tasks: tuple[str, ...],
    classes: Path | None,
    protocol: tuple[str, ...],
    max_samples: int | None,
    batch_size: int | None,
    precision: str,
    device: str,
    out: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Evaluate one checkpoint on published sets, or on held-out shards of one's own.

    On DreamLIP shards (--data) retrieval works; the other tasks need synthetic scenes. All numbers are percent, except
    ranks. Ties count against the model. Started by a launcher, the ranks divide the samples among them; the numbers are
    those of one process. --precision auto is bf16 on GPUs that have it. --batch-size is that of benchmarks.

    \b
    cosmos-fast eval run --checkpoint hf://sankim2/cosmos/cosmos_vitb16_cc12m.pt --benchmark coco=/data/coco \\
        --benchmark imagenet=/data/imagenet --out results.json
    cosmos-fast eval run --checkpoint runs/demo/cosmos --data data/demo/heldout --out runs/demo/eval.json
    torchrun --nproc_per_node 8 -m cosmos_fast.cli.main eval run --checkpoint runs/mine --benchmark coco=/data/coco
    """
    from cosmos_fast.cli.eval_models import Asked

    asked = Asked(
        checkpoint=checkpoint,
        weights=("teacher", "student") if weights == "both" else (weights,),
        benchmarks=benchmarks,
        data=data,
        tasks=tasks,
        classes=classes,
        max_samples=max_samples,
        batch_size=batch_size,
        precision=precision,
        device=device,
        storage=remote_settings(overrides),
        protocol=protocol,
    )
    answer(asked, out)


def answer(asked: Asked, out: Path | None) -> None:
    """Measure, show, and write what was asked for."""
    from cosmos_fast.cli.eval_models import measure_all, show
    from cosmos_fast.evaluate import record
    from cosmos_fast.utils.files import write_atomic
    from cosmos_fast.utils.ranks import joined_ranks

    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist: make it, or choose another path")
    asked.check()
    pick_device(asked.device)
    with joined_ranks(asked.device) as ranks:
        content = measure_all(asked, ranks)
        if not ranks.first:
            return
    show(asked, content)
    if out is not None:
        write_atomic(out, record.to_json(content))
        click.echo(f"wrote {out}")


command.add_command(eval_report.report)
command.add_command(eval_sets.command)
command.add_command(eval_compare.command)
