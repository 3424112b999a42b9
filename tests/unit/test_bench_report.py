"""The page of all benchmark results: bars, what is left out, and that it stands on its own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import report, report_plots, rows
from benchmarks.bars import BARS, MET, MISSED, OPEN, Bar, kind_of
from benchmarks.rows import Row
from cosmos_fast.cli import bench
from cosmos_fast.cli.main import run
from cosmos_fast.evaluate.report.plots import Plot

ROW = Row(
    name="step_mini",
    device="Some CPU, 2 threads",
    shapes={"batch": 16, "views": [2, 6]},
    metric="step_ms",
    value=1234.5,
    unit="ms",
    baseline="eager port",
    ratio=0.5,
    bar=0.65,
    floor_pct=48.0,
    commit="0123456789ab",
    versions={"torch": "2.99"},
)


def phases() -> list[Row]:
    parts = {"teacher": 100.0, "student": 300.0, "backward": 500.0, "other": 1.0, "wall": 901.0}
    return [
        replace(ROW, metric=f"{prefix}phase_ms/{name}", value=factor * value, ratio=None, bar=None, baseline=None)
        for prefix, factor in (("", 1.0), ("eager_", 2.0))
        for name, value in parts.items()
    ]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two devices, and three files that are no results."""
    folder = tmp_path / "results"
    cpu = [ROW, replace(ROW, metric="peak_mib", ratio=0.9, bar=0.7, unit="MiB"), *phases()]
    rows.write(cpu, folder / "some-cpu" / "step_mini.json")
    gpu = replace(ROW, name="step_vit_b_16", device="NVIDIA Test", ratio=0.7, bar=1 / 1.6)
    rows.write([gpu], folder / "nvidia" / "step_vit_b_16.json")
    check = [json.loads(json.dumps(row.__dict__)) for row in (gpu, replace(gpu, name="infonce", metric="x"))]
    (folder / "nvidia" / "gpu_check.json").write_text(json.dumps({"rows": check, "versions": {}}))
    (folder / "cut.json").write_text('[{"name": "step_mi')
    (folder / "other.json").write_text('[{"name": "x", "value": 1}]')
    (folder / "typed.json").write_text(json.dumps([{**check[0], "value": "fast"}]))
    return folder


def test_the_page_tells_devices_bars_and_what_it_left_out(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "page" / "report.html"
    done = CliRunner().invoke(bench.command, ["report", "--results", str(results), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "Some CPU, 2 threads: bars 1 met, 1 missed" in done.output
    assert "NVIDIA Test: bars 0 met, 1 missed" in done.output
    for name in ("cut.json", "other.json", "typed.json"):
        assert f"left out: {results / name}" in done.output
    page = out.read_text()
    for text in ("cut.json", "JSONDecodeError", "a row lacks fields", "Some CPU, 2 threads", "NVIDIA Test"):
        assert text in page, text
    for text in ("1,234", "eager port", "0.500", "0.65 ✓", "0.7 ✗", "48 %", "0123456789ab", "torch 2.99", "views 2×6"):
        assert text in page, text
    assert re.search(r"\d{4}-\d\d-\d\d, commit 0123456789ab", page)
    assert "not measured" in page
    # Nothing is loaded from anywhere.
    assert not re.search(r"(src|href|srcset)=\"(?!data:)", page)
    assert page.count("data:image/png;base64,") >= 4


def test_a_gpu_check_repeats_what_lies_beside_it(results: Path) -> None:
    files, unreadable = report.read_results(results)
    assert [(file.path.name, file.name) for file in files] == [
        ("gpu_check.json", "infonce"),
        ("step_vit_b_16.json", "step_vit_b_16"),
        ("step_mini.json", "step_mini"),
    ]
    assert [file.path.name for file in unreadable] == ["cut.json", "other.json", "typed.json"]
    assert not any("phase_ms" in row.metric for file in files for row in file.told)


def test_parts_of_a_gpu_check_are_read_like_a_whole_one(results: Path) -> None:
    folder = results / "nvidia"
    (folder / "gpu_check.json").rename(folder / "gpu_check_bench.json")
    (folder / "gpu_check_tests.json").write_text('{"rows": [], "versions": {}}')
    files, unreadable = report.read_results(folder)
    assert [(file.path.name, file.name) for file in files] == [
        ("gpu_check_bench.json", "infonce"),
        ("step_vit_b_16.json", "step_vit_b_16"),
    ]
    assert unreadable == []


def test_verdicts() -> None:
    bar = Bar("x", "cpu", "step_mini*", "step_ms", 0.65, "eager port")
    assert bar.verdict([ROW]) == MET
    assert bar.verdict([ROW, replace(ROW, ratio=0.7)]) == MISSED
    assert bar.verdict([replace(ROW, bar=None)]) == OPEN  # measured where no bar holds
    assert bar.verdict([replace(ROW, device="NVIDIA H200")]) == OPEN
    assert bar.verdict([replace(ROW, baseline="compiled port")]) == OPEN
    assert (kind_of("AMD EPYC, 2 threads"), kind_of("NVIDIA H200")) == ("cpu", "gpu")


def test_bars_of_committed_results_are_those_asked_for() -> None:
    files, unreadable = report.read_results(rows.RESULTS)
    assert unreadable == []
    found = [row for file in files for row in file.rows]
    for bar in BARS:
        assert all(row.bar == pytest.approx(bar.limit, rel=1e-3) for row in bar.rows(found)), bar.what


def test_pictures_of_a_device(results: Path) -> None:
    plots = report_plots.of_device([("step_mini", [ROW, *phases()])])
    assert [plot.key for plot in plots] == ["ratios", "ledger"]
    assert all(isinstance(plot, Plot) and set(plot.png) == {"light", "dark"} for plot in plots)
    assert all(png.startswith(b"\x89PNG") for plot in plots for png in plot.png.values())
    assert report_plots.of_device([("x", [replace(ROW, bar=None)])]) == []


def test_pictures_lie_beside_the_rows_they_are_of(results: Path, tmp_path: Path) -> None:
    arguments = ["report", "--results", str(results), "--out", str(tmp_path / "report.html")]
    made = []
    for _ in range(2):
        assert run(bench.command, arguments) == 0
        made.append({path.name: path.read_text() for path in (results / "some-cpu").glob("*.svg")})
    assert made[0] == made[1]
    assert set(made[0]) == {"ratios.svg", "ledger.svg"}
    assert all(text in made[0]["ledger.svg"] for text in ("mini, eager port", "backward", ">901<", ">1,802<"))
    assert "step mini peak mib" in made[0]["ratios.svg"]
    assert [path.name for path in (results / "nvidia").glob("*.svg")] == ["ratios.svg"]  # without a ledger


def test_committed_pictures_show_every_committed_bar_and_ledger() -> None:
    files, _ = report.read_results(rows.RESULTS)
    for file in files:
        pictures = {kind: file.path.with_name(f"{kind}.svg") for kind in ("ratios", "ledger")}
        for row in file.rows:
            if row.meets_bar is not None and not row.name.endswith("_sweep"):
                assert report_plots._label(row)[:40] in pictures["ratios"].read_text(), row
            if row.metric == "phase_ms/wall":
                assert f"{row.name.removeprefix('step_')}, cosmos-fast" in pictures["ledger"].read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--results", "nowhere"], "does not exist"), (["--results", "."], "no result file in . can be read")],
)
def test_nothing_to_report_is_one_line(arguments: list[str], told: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(bench.command, ["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
