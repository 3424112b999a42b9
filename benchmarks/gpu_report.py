"""What a GPU check leaves: one JSON with everything in it, and the row files, pictures and logs beside it or packed.

Written anew after every step, so that a check that is cut off has left what it found. Imports nothing beyond Python.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks import tally
from benchmarks.bars import BARS
from benchmarks.gpu_plan import Step
from benchmarks.gpu_run import INTERRUPTED, NOT_YET, PASSED, Folders, Outcome

READ = {"name", "device", "metric", "baseline", "ratio", "bar"}  # of a row, to judge it


@dataclass(frozen=True)
class Place:
    """Where the JSON goes. packed: everything else in one archive beside it; else as single files. part: of a check in
    several calls, whose files may lie in one folder."""

    folder: Path
    packed: bool
    part: str | None = None

    @property
    def stem(self) -> str:
        return f"gpu_check_{self.part}" if self.part else "gpu_check"


class Report:
    """Outcomes so far; `not run: yet to come` stands for every step until it has ended."""

    def __init__(self, facts: dict[str, Any], steps: Sequence[Step], folders: Folders, place: Place) -> None:
        """facts: device, commit and versions of the run."""
        self.outcomes = {step.name: Outcome(name=step.name) for step in steps}
        assert len(self.outcomes) == len(steps), "two steps have one name"
        self._facts = facts
        self._folders = folders
        self._place = place

    def ended(self, outcome: Outcome) -> None:
        """Take a step's outcome, say it, and write everything."""
        self.outcomes[outcome.name] = outcome
        print(f"{outcome.output_tail}\n== {outcome.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
        try:
            self.write()
        except OSError as error:  # a full disk may have room again after the next step
            print(f"error: the report cannot be written: {error}", flush=True)

    def interrupted(self) -> None:
        """Steps that are still to come will not."""
        for outcome in self.outcomes.values():
            if outcome.status == NOT_YET:
                outcome.status = INTERRUPTED
        self.write()

    @property
    def not_passed(self) -> dict[str, str]:
        return {outcome.name: outcome.status for outcome in self.outcomes.values() if outcome.status != PASSED}

    def content(self) -> dict[str, Any]:
        """What stands in the JSON."""
        rows, unreadable = _rows(self._folders.out)
        return {
            "versions": self._facts,
            "steps": [asdict(outcome) for outcome in self.outcomes.values()],
            "tests": tally.read(sorted(self._folders.tallies.glob("*.jsonl"))),
            "bars": _bars(rows),
            "unreadable": unreadable,
            "rows": rows,
        }

    def write(self) -> Path:
        """The JSON, in one rename, and what lies beside it."""
        folder = self._place.folder
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{self._place.stem}.json"
        _replace(target, (json.dumps(self.content(), indent=1) + "\n").encode())
        if self._place.packed:
            self._pack(folder / f"{self._place.stem}.tar.gz")
        else:
            for suffix in (".json", ".svg"):
                for path in self._folders.out.glob(f"*{suffix}"):
                    shutil.copy(path, folder / path.name)
        return target

    def _pack(self, target: Path) -> None:
        fresh = target.with_suffix(".new")
        with tarfile.open(fresh, "w:gz") as archive:
            for folder in (self._folders.out, self._folders.logs, self._folders.tallies):
                archive.add(folder, folder.name)
        fresh.replace(target)


def _rows(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of every file in the folder, and the names of files that hold none."""
    rows: list[dict[str, Any]] = []
    unreadable = []
    for path in sorted(folder.glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, list) or not all(isinstance(row, dict) and row.keys() >= READ for row in found):
                raise ValueError("no list of rows")
            rows += found
        except (OSError, ValueError) as error:
            unreadable.append(f"{path.name}: {error}")
    return rows, unreadable


def _bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every bar of a GPU, with what was measured against it: "not measured" where nothing was."""
    figures = [SimpleNamespace(**row) for row in rows]
    return [
        {"bar": bar.what, "limit": bar.limit, "verdict": bar.verdict(figures), "ratios": bar.ratios(figures)}
        for bar in BARS
        if bar.device == "gpu"
    ]


def _replace(path: Path, content: bytes) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.replace(path)
