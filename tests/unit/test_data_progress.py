"""Every `data` command that takes long has a bar, and every bar comes to its end."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.progress import Progress

from cosmos_fast.cli.main import command, run
from tests.downloads import dreamlip, write_download, write_dreamlip
from tests.shards import write_shards


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, float | None]]:
    """(what, how much is done, how much there is) of every bar, when it is taken away."""
    seen: list[tuple[str, float, float | None]] = []
    stop = Progress.stop

    def noted(self: Progress) -> None:
        seen.extend((task.description.split()[0], task.completed, task.total) for task in self.tasks)
        stop(self)

    monkeypatch.setattr(Progress, "stop", noted)
    return seen


def test_bars_of_all_commands(tmp_path: Path, bars: list[tuple[str, float, float | None]]) -> None:
    table = write_dreamlip(tmp_path / "table.csv", range(12))
    images = write_download(tmp_path / "images", (5, 4))
    shards = tmp_path / "shards"
    expected = {
        ("prepare",): {"reading": table.stat().st_size, "writing": 2 * 1000},
        ("index", str(shards)): {"indexing": 2},
        ("verify", str(shards), "--workers", "1"): {"verifying": 9},
        ("inspect", str(shards)): {"reading": 9},
        ("coverage", str(shards), "--walk"): {"walking": 9},
    }
    for arguments, totals in expected.items():
        bars.clear()
        words = dreamlip(table, images, shards, "--workers", "1") if arguments == ("prepare",) else ["data", *arguments]
        assert run(command, words) == 0
        found = {what: (done, total) for what, done, total in bars if total is not None}
        assert {what: (total, total) for what, total in totals.items()}.items() <= found.items(), (arguments, bars)


def test_inspect_indexes_behind_a_bar_too(tmp_path: Path, bars: list[tuple[str, float, float | None]]) -> None:
    assert run(command, ["data", "inspect", str(write_shards(tmp_path, (5, 4)))]) == 0
    assert ("indexing", 2, 2) in bars
