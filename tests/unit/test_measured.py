"""From the rows and tests of a GPU check to the table of measured orders."""

from __future__ import annotations

import json

from click.testing import CliRunner

from benchmarks import measured as tool
from cosmos_fast.ops import measured


def row(backend, elements, ms, device="Some GPU", name="infonce_sweep", metric="ms"):
    shapes = {"op": "multiview_infonce", "elements": elements, "backend": backend}
    return {"name": name, "device": device, "metric": f"{metric}/{backend}/1", "value": ms, "shapes": shapes}


ROWS = [
    *(row(name, 100, ms) for name, ms in (("cuda", 3.0), ("triton", 2.0), ("eager", 9.0))),
    *(row(name, 400, ms) for name, ms in (("cuda", 4.0), ("triton", 3.0), ("eager", 19.0))),
    *(row(name, 1600, ms) for name, ms in (("cuda", 5.0), ("triton", 6.0))),
    row("cuda", 400, 0.1, metric="graph_ms"),
    row("cuda", 400, 0.1, name="infonce"),
]
REPORT = {
    "versions": {"device": "Some GPU", "commit": "abc"},
    "rows": [*ROWS, row("eager", 5, 1.0, device="A CPU")],
    "tests": {
        "test_infonce_triton": {"passed": 3, "failed": 0, "skipped": 1, "unfinished": 0},
        "test_adamw_ema_cuda": {"passed": 3, "failed": 0, "skipped": 0, "unfinished": 0},
        "test_pool_triton": {"passed": 3, "failed": 1, "skipped": 0, "unfinished": 0},
        "test_pool_cuda": {"passed": 0, "failed": 0, "skipped": 5, "unfinished": 0},
        "test_distill_triton": {"passed": 3, "failed": 0, "skipped": 0, "unfinished": 1},
        "test_truth": {"passed": 9, "failed": 0, "skipped": 0, "unfinished": 0},
    },
}


def test_orders_change_half_way_between_sizes():
    assert tool.orders(ROWS, "abc") == [
        {"op": "multiview_infonce", "device": "Some GPU", "up_to_elements": 800,
         "backends": ["triton", "cuda", "eager"], "commit": "abc"},
        {"op": "multiview_infonce", "device": "Some GPU", "up_to_elements": None,
         "backends": ["cuda", "triton"], "commit": "abc"},
    ]  # fmt: skip


def test_a_backend_has_run_where_its_tests_passed_and_none_failed():
    found = {(entry["op"], entry["backend"]) for entry in tool.ran(REPORT["tests"], "Some GPU", "abc")}
    assert found == {("multiview_infonce", "triton"), ("adamw_ema", "cuda"), ("grad_norm", "cuda")}


def test_the_command_replaces_one_device_and_keeps_the_others(tmp_path, monkeypatch):
    old = {"op": "multiview_infonce", "up_to_elements": None, "backends": ["eager"], "commit": "old"}
    table = tmp_path / "measured.json"
    table.write_text(json.dumps({"order": [{**old, "device": "Some GPU"}, {**old, "device": "Other"}], "ran": []}))
    (tmp_path / "gpu_check.json").write_text(json.dumps(REPORT))
    monkeypatch.setattr(measured, "TABLE", table)
    measured.load.cache_clear()
    try:
        for _ in range(2):
            result = CliRunner().invoke(tool.command, [str(tmp_path / "gpu_check.json")])
            assert result.exit_code == 0, result.output
        assert [entry.backends for entry in measured.entries("multiview_infonce", "Other")] == [("eager",)]
        ours = measured.entries("multiview_infonce", "Some GPU")
        assert [entry.up_to_elements for entry in ours] == [800, float("inf")]
        assert measured.devices_of("adamw_ema", "cuda") == ["Some GPU"]
        assert measured.devices_of("adamw_ema", "triton") == []
    finally:
        measured.load.cache_clear()


def test_a_check_in_parts_is_measured_like_a_whole_one(tmp_path, monkeypatch):
    table = tmp_path / "measured.json"
    table.write_text(tool.text({"order": [], "ran": []}))
    monkeypatch.setattr(measured, "TABLE", table)
    whole = tool.merge({"order": [], "ran": []}, REPORT)
    parts = {"sweeps": {**REPORT, "tests": {}}, "tests": {**REPORT, "rows": []}}
    paths = [tmp_path / f"gpu_check_{name}.json" for name in parts]
    for path, part in zip(paths, parts.values(), strict=True):
        path.write_text(json.dumps(part))
    result = CliRunner().invoke(tool.command, list(map(str, paths)))
    assert result.exit_code == 0, result.output
    assert json.loads(table.read_text()) == whole
    paths[1].write_text(json.dumps({**REPORT, "versions": {"device": "Some GPU", "commit": "later"}}))
    result = CliRunner().invoke(tool.command, list(map(str, paths)))
    assert result.exit_code == 2
    assert "reports of commit abc and of later" in result.output


def test_an_empty_table_is_written_as_the_committed_one_begins():
    assert json.loads(tool.text({"order": [], "ran": []})) == {"order": [], "ran": []}
