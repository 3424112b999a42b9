"""`cosmos-fast eval`: numbers of one checkpoint, and the report that compares two runs with chance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cosmos_fast.utils.errors import UserError

if TYPE_CHECKING:
    from cosmos_fast.data.storage import Storage
    from cosmos_fast.evaluate.division import Division
    from cosmos_fast.evaluate.report.build import Inputs
    from cosmos_fast.evaluate.scenes import SceneSet
    from cosmos_fast.evaluate.tasks import TaskResult
    from cosmos_fast.utils.ranks import Ranks

TASKS = ("retrieval", "classification", "segmentation")


@click.group("eval")
def command() -> None:
    """Measure checkpoints: retrieval, zero-shot classification and segmentation."""


def _tasks(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise click.BadParameter(f"{value!r}: give some of {','.join(TASKS)}")
    return names


_TAKES_REMOTE = click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="A data.remote key or data.allow_pipe; repeatable."
)


@command.command("run")
@click.option("--checkpoint", type=click.Path(path_type=Path), required=True, help="Run or checkpoint folder, or file.")
@click.option("--weights", type=click.Choice(["teacher", "student"]), default="teacher", show_default=True)
@click.option("--data", required=True, help="Held-out shards: directory, glob, brace pattern, file or URL.")
@click.option("--tasks", callback=_tasks, default=",".join(TASKS), show_default=True, help="Comma-separated.")
@click.option("--max-samples", type=click.IntRange(1), help="Evaluate the first so many samples only.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file for results and protocol.")
@_TAKES_REMOTE
def run(
    checkpoint: Path,
    weights: str,
    data: str,
    tasks: tuple[str, ...],
    max_samples: int | None,
    device: str,
    out: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Evaluate one checkpoint. Retrieval works on any DreamLIP shards; the other tasks need synthetic scenes.

    All numbers are percent, except ranks. Ties count against the model. Started by a launcher, the ranks divide the
    samples among them; the numbers are those of one process.

    \b
    cosmos-fast eval run --checkpoint runs/demo/cosmos --data data/demo/heldout --out runs/demo/eval.json
    torchrun --nproc_per_node 8 -m cosmos_fast.cli.main eval run --checkpoint runs/mine --data 'coco/{00..49}.tar'
    """
    from cosmos_fast.utils.files import write_atomic
    from cosmos_fast.utils.ranks import joined_ranks

    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist: make it, or choose another path")
    storage = remote_settings(overrides)
    pick_device(device)
    with joined_ranks(device) as ranks:
        results, content = measure_one(ranks, device, checkpoint, weights, data, tasks, max_samples, storage)
        if not ranks.first:
            return
    print_table(f"{checkpoint.name}, {weights}, {content['data']['samples']} samples", {weights: results})
    if out is not None:
        from cosmos_fast.evaluate import record

        write_atomic(out, record.to_json(content))
        click.echo(f"wrote {out}")


def remote_settings(overrides: Sequence[str]) -> Storage:
    """How remote shards are read: of a run's settings, those that say it."""
    from cosmos_fast.config import TrainConfig, load_config
    from cosmos_fast.data.storage import Storage

    foreign = [text for text in overrides if not text.startswith(("data.remote.", "data.allow_pipe="))]
    if foreign:
        raise UserError(f"--set {foreign[0]}: evaluation has the settings data.remote.* and data.allow_pipe")
    return Storage.of(load_config(TrainConfig(name="eval"), overrides).data)


def measure_one(
    ranks: Ranks,
    device: str,
    checkpoint: Path,
    weights: str,
    data: str,
    tasks: Sequence[str],
    max_samples: int | None,
    storage: Storage,
) -> tuple[dict[str, TaskResult], dict[str, Any]]:
    """The results of one model's tasks, and what the JSON file holds; the same on all ranks."""
    from cosmos_fast.config import SourceConfig
    from cosmos_fast.evaluate import record
    from cosmos_fast.evaluate.division import Division
    from cosmos_fast.evaluate.scenes import SceneSet
    from cosmos_fast.model.checkpoints import find_weights_file, load_checkpoint
    from cosmos_fast.utils.files import sha256_of
    from cosmos_fast.utils.ranks import device_of_rank

    with ranks.together():
        model = load_checkpoint(checkpoint, weights=weights)  # type: ignore[arg-type]
        model = model.to(pick_device(device_of_rank(device, ranks)))
        scenes = SceneSet((SourceConfig(path=data),), max_samples, storage)
        for task in tasks:
            if task != "retrieval":
                scenes.require_meta(task)
        file = find_weights_file(checkpoint, weights)  # type: ignore[arg-type]
        digest = sha256_of(file)
    with progress_bar(ranks.first) as bar:
        results = evaluate_all(model, dict.fromkeys(tasks, scenes), bar, division=Division(ranks))
    content = {
        "format": "cosmos-fast-eval/1",
        "checkpoint": {"name": file.name, "weights": weights, "sha256": digest},
        "model": model.config.to_openclip(),
        "data": record.data_record(scenes, ranks),
        "tasks": record.task_records(results),
        "versions": record.versions(),
        "machine": record.machine(),
    }
    return results, content


@command.command("report")
@click.option("--cosmos", type=click.Path(path_type=Path), required=True, help="Run folder of the COSMOS run.")
@click.option("--clip", type=click.Path(path_type=Path), help="Run folder of the plain CLIP run to compare with.")
@click.option("--data", required=True, help="Held-out synthetic shards: directory, glob, brace pattern or file.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the report.")
@click.option("--max-samples", type=click.IntRange(1), help="Evaluate the first so many samples only.")
@click.option("--segmentation-samples", type=click.IntRange(1), help="Segment the first so many of them only.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")
@_TAKES_REMOTE
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


def pick_device(name: str) -> str:
    """A torch device name; "auto" is the GPU where there is one."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no usable GPU here; use --device cpu")
    if name != "cpu" and not name.startswith("cuda"):
        raise UserError(f"--device {name!r}: choose cpu, cuda or auto")
    return name


@contextmanager
def progress_bar(shown: bool = True) -> Iterator[Any]:
    """A transient progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("scenes"))
    with Progress(
        *columns, TimeElapsedColumn(), transient=True, console=Console(stderr=True), disable=not shown
    ) as bar:
        yield bar


def evaluate_all(
    model: Any, tasks: Mapping[str, SceneSet], bar: Any, label: str = "", division: Division | None = None
) -> dict[str, TaskResult]:
    """Every task, each on its scenes, on one model, with a bar a task for this rank's part."""
    from cosmos_fast.evaluate.division import ALONE
    from cosmos_fast.evaluate.tasks import evaluate

    division = division or ALONE
    results = {}
    for task, scenes in tasks.items():
        passes = 2 if task == "segmentation" else 1
        handle = bar.add_task(f"{label} {task}".strip(), total=passes * scenes.samples_in(division.own(scenes.blocks)))
        results[task] = evaluate(model, scenes, task, partial(bar.advance, handle), division)
        bar.remove_task(handle)
    return results


def print_table(title: str, results: Mapping[str, Mapping[str, TaskResult]]) -> None:
    """Headline numbers of some models beside chance, on stdout."""
    from rich.console import Console
    from rich.table import Table

    from cosmos_fast.evaluate.report.build import flat_results
    from cosmos_fast.evaluate.report.findings import LABELS, table

    flat = flat_results(results)
    shown = Table(title=title, title_justify="left")
    shown.add_column("")
    for name in flat:
        shown.add_column(LABELS.get(name, name) if len(flat) > 2 else name, justify="right")
    group = ""
    for line in table(flat):
        if line.group != group:
            group = line.group
            shown.add_section()
            shown.add_row(f"[bold]{group}[/bold]")
        cells = [line.cells[name] for name in flat]
        shown.add_row(
            f"  {line.label}", *(f"[bold green]{c.text}[/]" if c.best and len(flat) > 2 else c.text for c in cells)
        )
    Console().print(shown)
