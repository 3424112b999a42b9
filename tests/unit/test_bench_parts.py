"""A benchmark part by part: what one part costs the others (nothing), and what is compared with what."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import bench_infonce, bench_optimizer, bench_packed_text, parts, rows
from benchmarks.rows import Row
from cosmos_fast.utils.errors import UserError

ROW = Row(name="toy", device="Some GPU", shapes={}, metric="ms", value=1.0, unit="ms", commit="c", versions={})


def fails():
    yield ROW
    raise AssertionError("the sides differ")


def too_large():
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_part_that_fails_or_does_not_fit_leaves_the_others(tmp_path, capsys):
    out = tmp_path / "toy.json"
    written = []

    def look():
        written.append(out.exists())
        return [ROW]

    planned = [("first", lambda: [ROW]), ("large", too_large), ("wrong", fails), ("last", look)]
    with pytest.raises(UserError, match=r"^wrong \(AssertionError\) failed"):
        parts.measure(planned, out)
    assert written == [True]  # after each part, not at the end
    assert len(json.loads(out.read_text())) == 3  # what the part had before it failed, too
    told = capsys.readouterr()
    assert "left out: large: out of memory" in told.out
    assert "the sides differ" in told.err


def test_a_part_that_only_does_not_fit_is_no_failure(tmp_path):
    assert parts.measure([("large", too_large), ("x", lambda: [ROW])], tmp_path / "toy.json") == [ROW]
    with pytest.raises(UserError, match="nothing was measured"):
        parts.measure([("large", too_large)], tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


def test_captions_of_a_gpu_run_begin_on_the_host():
    """As a loader leaves them, so that packing and copying are within the clock."""
    setting = bench_packed_text.Setting(samples=1, layers=1, device="cuda", precision="bf16")
    assert setting.captions(0).device.type == "cpu"


def test_a_baseline_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench_infonce, "interleave", lambda *_, **__: pytest.fail("it was timed"))
    setting = bench_infonce.Setting(dim=16, device="cpu", backend="auto", repeats=7)
    with pytest.raises(AssertionError, match="baseline's loss disagrees"):
        bench_infonce.measure_time(4, setting, "half", lambda features: bench_infonce.run_eager(features) / 2, None)


def test_the_optimizer_takes_devices_and_repetitions_that_there_are(capsys):
    for wrong in (["--device", "gpu"], ["--repeats", "3"]):
        with pytest.raises(SystemExit):
            bench_optimizer.command.main(args=wrong, prog_name="optimizer")
        assert "Invalid value" in capsys.readouterr().err


def test_a_tree_without_history_says_what_it_was_told(monkeypatch):
    def no_git(*_):
        raise OSError("no git")

    monkeypatch.setattr(rows, "git", no_git)
    monkeypatch.setenv("COSMOS_COMMIT", "0123456789ab")
    assert rows.commit() == "0123456789ab"
    monkeypatch.delenv("COSMOS_COMMIT")
    assert rows.commit() == "unknown"
