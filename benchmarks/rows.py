"""Result rows: what was measured, on what, from which commit; written as JSON, shown as a table."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.bars import meets
from cosmos_fast.utils.files import write_atomic

if TYPE_CHECKING:
    from rich.console import Console

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WIDE = 160


def commit() -> str:
    """Hash of the checked-out commit, with "+dirty" when tracked files other than results differ from it.

    Of a tree that was copied without its history, what COSMOS_COMMIT says.
    """
    try:
        revision = git("rev-parse", "--short=12", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("COSMOS_COMMIT", "unknown")
    return f"{revision}+dirty" if changes else revision


def versions() -> dict[str, str]:
    """Versions that a figure depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "cosmos-fast"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def device_name(device: str) -> str:
    """The hardware in words: the GPU's name, or the processor's with the number of threads used."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure. `value` (in `unit`) is the candidate's; `ratio` is value over the baseline's where smaller is better.

    baseline: name of what it is compared with. bar: the ratio asked for. floor_pct: share of the hardware's limit that
    is reached, percent. `device`, `commit` and `versions` describe the run.
    """

    name: str
    device: str
    shapes: dict[str, object]
    metric: str
    value: float
    unit: str
    baseline: str | None = None
    ratio: float | None = None
    floor_pct: float | None = None
    bar: float | None = None
    commit: str = field(default_factory=commit)
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def meets_bar(self) -> bool | None:
        """None where there is nothing to meet."""
        return meets(self)


def write(rows: Sequence[Row], out: Path | None = None) -> Path:
    """Write rows as a JSON array, one row a line, in one rename; returns the path.

    out: the file; default `benchmarks/results/<device>/<name of the first row>.json`.
    """
    path = out or RESULTS / slug(rows[0].device) / f"{rows[0].name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps({key: _rounded(value) for key, value in asdict(row).items()}) for row in rows)
    write_atomic(path, f"[\n{lines}\n]\n")
    return path


def show(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the rows of one benchmark as a table; as they are where rich, which draws it, is missing."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for row in rows:
            print(f"{row.name} {row.metric}: {row.value:,.5g} {row.unit}, {row.ratio} of {row.baseline}, bar {row.bar}")
        return
    table = Table(title=f"{rows[0].name} on {rows[0].device}, commit {rows[0].commit}", title_justify="left")
    with_floor = any(row.floor_pct is not None for row in rows)
    for heading in ("metric", "value", "against", "ratio", "bar", *(["floor"] if with_floor else [])):
        table.add_column(
            heading, justify="left" if heading in ("metric", "against") else "right", no_wrap=heading != "against"
        )
    for row in rows:
        verdict = {True: " met", False: " MISSED", None: ""}[row.meets_bar]
        table.add_row(
            row.metric,
            f"{row.value:,.1f} {row.unit}",
            row.baseline or "",
            "" if row.ratio is None else f"{row.ratio:.3f}",
            "" if row.bar is None else f"{row.bar:g}{verdict}",
            *([""] if row.floor_pct is None else [f"{row.floor_pct:.0f} %"])[: int(with_floor)],
        )
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDE)  # a log wraps no lines
    console.print(table)


def slug(text: str) -> str:
    """A folder name from a device's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _rounded(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def git(*arguments: str) -> str:
    """What git says in the checkout; raises OSError or CalledProcessError."""
    found = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True, timeout=30)
    return found.stdout.strip()


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
