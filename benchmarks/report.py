"""All result files as one page: what was measured on which device, which bars are met, and where the time goes.

The page is one HTML file that loads nothing from anywhere. Files that cannot be read are named on it, and left out.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
from jinja2 import ChoiceLoader, FileSystemLoader

from benchmarks import report_plots
from benchmarks.bars import BARS, MET, MISSED, OPEN, Bar, kind_of
from benchmarks.gpu_plan import PARTS
from benchmarks.rows import RESULTS, Row, git
from cosmos_fast.evaluate.report.page import environment
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.files import write_atomic

KINDS = {"cpu": "CPU", "gpu": "GPU"}
CHECKS = ("gpu_check", *(f"gpu_check_{part}" for part in PARTS))
QUIET = ("phase_ms/", "eager_phase_ms/", "ms/", "graph_ms/", "peak_mib/eager/")  # of pictures, not of the table


@dataclass(frozen=True)
class ResultFile:
    """Rows of one benchmark. date: of the commit that holds the file, or of the file where none does yet."""

    path: Path
    date: str
    rows: list[Row]

    @property
    def name(self) -> str:
        return self.rows[0].name

    @property
    def told(self) -> list[Row]:
        """Rows for the table."""
        return [row for row in self.rows if not row.metric.startswith(QUIET) and not row.name.endswith("_sweep")]

    @property
    def versions(self) -> str:
        return ", ".join(f"{name} {version}" for name, version in self.rows[0].versions.items())

    @property
    def commits(self) -> list[str]:
        return sorted({row.commit for row in self.rows})


@dataclass(frozen=True)
class Unreadable:
    """A file that is no list of rows, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Asked:
    """A bar, its verdict on one device, and what was measured against it."""

    bar: Bar
    verdict: str
    ratios: list[float]


def read_results(folder: Path) -> tuple[list[ResultFile], list[Unreadable]]:
    """Every JSON file below `folder`, sorted by path. A whole GPU check's file repeats those that lie beside it."""
    files: list[ResultFile] = []
    unreadable: list[Unreadable] = []
    for path in sorted(folder.rglob("*.json")):
        try:
            by_name: dict[str, list[Row]] = {}
            for row in _rows(path):
                by_name.setdefault(row.name, []).append(row)
            date = _date(path)
            files += [ResultFile(path, date, rows) for name, rows in by_name.items() if not _repeated(path, name)]
        except (OSError, ValueError, TypeError, KeyError) as error:
            unreadable.append(Unreadable(path, f"{type(error).__name__}: {error}"))
    return files, unreadable


def _repeated(path: Path, name: str) -> bool:
    return path.stem in CHECKS and path.with_name(f"{name}.json").exists()


def _rows(path: Path) -> list[Row]:
    stored = json.loads(path.read_text(encoding="utf-8"))
    if path.stem in CHECKS and isinstance(stored, dict):
        stored = stored.get("rows")
        if stored == []:  # its tests alone
            return []
    if not isinstance(stored, list) or not stored:
        raise ValueError("no list of rows")
    names = {field.name for field in fields(Row)}
    rows = []
    for values in stored:
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError("a row lacks fields, or has others than a row has")
        if not isinstance(values["value"], (int, float)) or not isinstance(values["shapes"], dict):
            raise ValueError(f"row {values['metric']!r} has a value or shapes of another type")
        rows.append(Row(**values))
    return rows


def _date(path: Path) -> str:
    """Day of the last commit of the file; of the file itself where it is changed or not in a repository."""
    try:
        changed = git("status", "--porcelain", "--", str(path.resolve()))
        committed = "" if changed else git("log", "-1", "--format=%cs", "--", str(path.resolve()))
    except (OSError, subprocess.SubprocessError):
        committed = ""
    return committed or datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).strftime("%Y-%m-%d")


def asked(files: Sequence[ResultFile], kind: str) -> list[Asked]:
    """All bars of a kind of device over the rows of one device."""
    rows = [row for file in files for row in file.rows]
    return [Asked(bar, bar.verdict(rows), bar.ratios(rows)) for bar in BARS if bar.device == kind]


def page_content(files: Sequence[ResultFile], unreadable: Sequence[Unreadable], folder: Path) -> dict[str, Any]:
    """Every name the template uses."""
    by_device: dict[str, list[ResultFile]] = {}
    for file in files:
        by_device.setdefault(file.rows[0].device, []).append(file)
    devices = [_device(name, members, folder) for name, members in sorted(by_device.items())]
    unseen = [kind for kind in KINDS if kind not in {kind_of(name) for name in by_device}]
    devices += [
        {"name": f"No {KINDS[kind]} yet", "files": [], "asked": asked([], kind), "plots": []} for kind in unseen
    ]
    verdicts = Counter(one.verdict for device in devices for one in device["asked"])
    return {
        "devices": devices,
        "unreadable": [(str(file.path.relative_to(folder)), file.reason) for file in unreadable],
        "stats": [(verdicts[name], f"bars {name}") for name in (MET, MISSED, OPEN)] + [(len(files), "result files")],
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "marks": {MET: "✓", MISSED: "✗", OPEN: "–"},
    }


def _device(name: str, files: Sequence[ResultFile], folder: Path) -> dict[str, Any]:
    return {
        "name": name,
        "files": [(file, str(file.path.relative_to(folder)), _shapes(file.told)) for file in files if file.told],
        "asked": asked(files, kind_of(name)),
        "plots": report_plots.of_device([(file.name, file.rows) for file in files]),
    }


def _shapes(rows: Sequence[Row]) -> str:
    """Sizes that all rows of a file share, short."""
    if not rows:
        return ""
    first = rows[0].shapes
    common = {key: value for key, value in first.items() if all(row.shapes.get(key) == value for row in rows)}
    common = {key: value for key, value in common.items() if not isinstance(value, float)}
    return ", ".join(f"{key} {_short(value)}" for key, value in common.items())


def _short(value: object) -> str:
    return "×".join(map(str, value)) if isinstance(value, list) else str(value)


def render(files: Sequence[ResultFile], unreadable: Sequence[Unreadable], folder: Path) -> str:
    """The page."""
    jinja = environment()
    own = FileSystemLoader(Path(__file__).parent / "templates")
    jinja.loader = ChoiceLoader([own, *([jinja.loader] if jinja.loader else [])])
    return jinja.get_template("bench_report.html.j2").render(page_content(files, unreadable, folder))


def told(bars: Iterable[Asked]) -> str:
    """How many bars are met, missed and open, in words."""
    counts = Counter(one.verdict for one in bars)
    return ", ".join(f"{counts[name]} {name}" for name in (MET, MISSED, OPEN))


@click.command(name="report", help=__doc__)
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    default=RESULTS,
    help="Folder of result files; default: benchmarks/results.",
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="HTML file; default: report.html in there."
)
def command(results: Path, out: Path | None) -> None:
    if not results.is_dir():
        raise UserError(f"folder of results {results} does not exist: run a benchmark first, or correct --results")
    files, unreadable = read_results(results)
    for file in unreadable:
        click.echo(f"left out: {file.path} ({file.reason})", err=True)
    if not files:
        raise UserError(f"no result file in {results} can be read: run a benchmark first, or correct --results")
    path = out or results / "report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, render(files, unreadable, results))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another --out") from None
    for device in sorted({file.rows[0].device for file in files}):
        own = [file for file in files if file.rows[0].device == device]
        click.echo(f"{device}: bars {told(asked(own, kind_of(device)))}")
        try:
            report_plots.draw([(file.name, file.rows) for file in own], own[0].path.parent)
        except OSError as error:
            click.echo(f"no pictures beside the rows of {device} ({error.strerror})", err=True)
    click.echo(f"wrote {path}")


if __name__ == "__main__":
    command()
