"""The GPU side of every benchmark, with a CPU that plays the GPU: it runs, and the bars know its rows."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import rehearsal
from benchmarks.bars import BARS, OPEN
from benchmarks.gpu_plan import plan
from benchmarks.rows import Row
from cosmos_fast.data import dali_pipeline

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing to play")

# Of packages that are not here.
ABSENT = ("flash", "varlen", "Inf-CL", "Liger KL")
STEPS = {step.name: step.command for step in plan() if step.name.startswith(("bench", "sweep"))}


def rehearse(name, tmp_path):
    """Rows that a step of the GPU check writes."""
    command = [part.replace("{out}", str(tmp_path)).replace("{budget}", "3600") for part in STEPS[name]]
    rehearsal.rehearse(command[1].removeprefix("benchmarks."), command[2:])
    (path,) = tmp_path.glob("*.json")
    return [Row(**row) for row in json.loads(path.read_text())]


LONG = ("step", "attention", "savings", "loader", "tokenizer", "eval")  # more than a second or two


def marked(name):
    kind, bench = name.split()[:2]
    short = kind == "bench" and bench not in LONG
    return pytest.param(name, marks=() if short else pytest.mark.long)


@pytest.mark.parametrize("name", [marked(name) for name in STEPS])
def test_every_benchmark_of_the_gpu_check_runs_and_meets_its_bars_names(name, tmp_path):
    found = rehearse(name, tmp_path)
    assert found
    assert {row.device for row in found} == {rehearsal.DEVICE}
    assert torch.cuda.is_available() is False  # the play is over
    for bar in BARS:
        rows = bar.rows(found)
        assert all(row.bar == pytest.approx(bar.limit, rel=1e-3) for row in rows), (bar.what, rows)
        there = bar.baseline not in ABSENT and not (bar.metric.endswith("/dali") and dali_pipeline.why_unusable("cpu"))
        if bar.device == "gpu" and bar.name == found[0].name and there:
            assert bar.verdict(found) != OPEN, bar.what


def test_a_cuda_torch_without_a_driver_is_not_asked_whether_it_captures(monkeypatch):
    def no_driver():
        raise RuntimeError("CUDA driver version is insufficient")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", no_driver)
    with rehearsal.played_by_cpu():
        assert torch.cuda.is_current_stream_capturing() is False
