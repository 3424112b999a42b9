"""`cosmos-fast eval report`: the page that compares two runs with chance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cosmos_fast.cli.eval_shown import (
    TAKES_REMOTE,
    TASKS,
    evaluate_all,
    pick_device,
    print_table,
    progress_bar,
    remote_settings,
)
from cosmos_fast.utils.errors import UserError

if TYPE_CHECKING:
    from cosmos_fast.evaluate.report.build import Inputs
    from cosmos_fast.evaluate.scenes import SceneSet


@click.command("report")
@click.option("--cosmos", type=click.Path(path_type=Path), required=True, help="Run folder of the COSMOS run.")
@click.option("--clip", type=click.Path(path_type=Path), help="Run folder of the plain CLIP run to compare with.")
@click.option("--data", required=True, help="Held-out synthetic shards: directory, glob, brace pattern or file.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the report.")
@click.option("--max-samples", type=click.IntRange(1), help="Evaluate the first so many samples only.")
@click.option("--segmentation-samples", type=click.IntRange(1), help="Segment the first so many of them only.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")
@TAKES_REMOTE
@click.option(
    "--require-chance-multiple",
    type=click.FloatRange(0),
    default=0.0,
    help="Exit with status 1 if the COSMOS teacher's image-to-text R@1 is below this many times chance.",
)
def report(
    cosmos: Path,
    clip: Path | None,
    data: str,
    out: Path,
    max_samples: int | None,
    segmentation_samples: int | None,
    device: str,
    overrides: tuple[str, ...],
    require_chance_multiple: float,
) -> None:
    """Compare COSMOS student and teacher, plain CLIP and chance; writes report.html, results.json and plots/ to OUT.

    \b
    cosmos-fast eval report --cosmos runs/demo/cosmos --clip runs/demo/clip --data data/demo/heldout --out runs/demo
    """
    from cosmos_fast.config import SourceConfig
    from cosmos_fast.evaluate.report import build, page
    from cosmos_fast.evaluate.scenes import SceneSet
    from cosmos_fast.utils.ranks import place_of_environment

    if place_of_environment().world_size > 1:
        raise UserError("the report is made by one process: start it without a launcher")
    scenes = SceneSet((SourceConfig(path=data),), max_samples, remote_settings(overrides))
    scenes.require_meta("the report")
    inputs = measure(cosmos, clip, scenes, pick_device(device), segmentation_samples)
    files = build.build_files(inputs)
    page.write_files(out, files)
    print_table(f"{len(scenes)} held-out scenes", inputs.results)
    click.echo(f"report: {out / 'report.html'}")
    times = build.chance_multiple(inputs.results)
    if times < require_chance_multiple:
        raise click.ClickException(
            f"FAILED: the COSMOS teacher's image-to-text R@1 is {times:.1f} times chance, below the required "
            f"{require_chance_multiple:g} times: it has not learned enough (see {out / 'report.html'})"
        )


def measure(
    cosmos: Path, clip: Path | None, scenes: SceneSet, device: str, segmentation_samples: int | None = None
) -> Inputs:
    """Load every model and run every task on it. All runs and weights are read before the first measurement.

    segmentation_samples: segment only so many of the scenes, the first ones; this task takes longest.
    """
    from cosmos_fast.evaluate.report.build import Inputs
    from cosmos_fast.evaluate.report.findings import CLIP, LABELS, STUDENT, TEACHER
    from cosmos_fast.evaluate.report.runs import read_run
    from cosmos_fast.model.checkpoints import find_weights_file, load_checkpoint
    from cosmos_fast.utils.files import sha256_of

    runs = {folder: read_run(folder) for folder in (cosmos, clip) if folder is not None}
    wanted = {TEACHER: (cosmos, "teacher"), STUDENT: (cosmos, "student")}
    if clip is not None:
        # Plain CLIP has no use for a teacher: its own weights are what it is known by.
        wanted[CLIP] = (clip, "student")
    models = {name: load_checkpoint(*source).to(device) for name, source in wanted.items()}  # type: ignore[arg-type]
    digests = {name: sha256_of(find_weights_file(*source)) for name, source in wanted.items()}  # type: ignore[arg-type]
    tasks = dict.fromkeys(TASKS, scenes)
    if segmentation_samples is not None:
        tasks["segmentation"] = scenes.first(segmentation_samples)
    with progress_bar() as bar:
        results = {name: evaluate_all(model, tasks, bar, LABELS[name]) for name, model in models.items()}
    return Inputs(runs[cosmos], runs[clip] if clip else None, models[TEACHER], scenes, results, digests)
