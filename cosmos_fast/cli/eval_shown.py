"""What the evaluation commands share: device, remote settings, progress bars, and tables on the screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from cosmos_fast.utils.errors import UserError

if TYPE_CHECKING:
    from cosmos_fast.data.storage import Storage
    from cosmos_fast.evaluate.division import Division
    from cosmos_fast.evaluate.scenes import SceneSet
    from cosmos_fast.evaluate.tasks import TaskResult

TASKS = ("retrieval", "classification", "segmentation")
TAKES_REMOTE = click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="A data.remote key or data.allow_pipe; repeatable."
)


def remote_settings(overrides: Sequence[str]) -> Storage:
    """How remote shards are read: of a run's settings, those that say it."""
    from cosmos_fast.config import TrainConfig, load_config
    from cosmos_fast.data.storage import Storage

    foreign = [text for text in overrides if not text.startswith(("data.remote.", "data.allow_pipe="))]
    if foreign:
        raise UserError(f"--set {foreign[0]}: evaluation has the settings data.remote.* and data.allow_pipe")
    return Storage.of(load_config(TrainConfig(name="eval"), overrides).data)


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
def progress_bar(shown: bool = True, unit: str = "scenes") -> Iterator[Any]:
    """A transient progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
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
    Console(emoji=False).print(shown)


def print_benchmarks(title: str, groups: Mapping[str, tuple[str, Mapping[str, Mapping[str, float]]]]) -> None:
    """A table on stdout. groups: heading -> task, and column -> metrics; the best of several models is marked, not
    chance."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from cosmos_fast.evaluate.tables import rows, spelled

    columns = list(dict.fromkeys(column for _, found in groups.values() for column in found))
    shown = Table(title=escape(title), title_justify="left")
    shown.add_column("")
    for column in columns:
        shown.add_column(escape(column), justify="right")
    for heading, (task, found) in groups.items():
        shown.add_section()
        shown.add_row(f"[bold]{escape(heading)}[/bold]")
        for row in rows(task, found):
            best = row.best() - {"chance"}
            cells = (spelled(row.values.get(column)) for column in columns)
            marked = (f"[bold green]{c}[/]" if n in best else c for n, c in zip(columns, cells, strict=True))
            shown.add_row(f"  {row.label}", *marked)
    Console(emoji=False).print(shown)
