"""Sweeps and their pictures: who is measured, against what, within which time, and what stands in the rows."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from click.testing import CliRunner

from benchmarks import bench_infonce, harness, plots, rows, sweep, sweeps
from benchmarks.sweep import Point, Rates, Sweep, bytes_of, measure, sets_needed
from cosmos_fast.ops import backends
from cosmos_fast.ops.backends import Backend, register
from tests.hand_clock import HandClock


def run(backend, inputs):
    if backend == "narrow" and inputs["x"].numel() > 8:
        raise ValueError("it takes 8 elements at most")
    harness.time.sleep({"eager": 4e-3, "fast": 1e-3, "wrong": 0.0, "narrow": 2e-3}[backend])
    return {"double": 2 * inputs["x"] + (backend == "wrong")}


def point(size, bar=None):
    return Point(
        size=size,
        shapes={"n": size},
        elements=size,
        flops=1e6 * size,
        bytes=8.0 * size,
        make_inputs=lambda seed: {"x": torch.full((size,), float(seed + 1))},
        run=run,
        rtol=1e-6,
        bar=bar,
    )


@pytest.fixture
def toy(monkeypatch):
    """A sweep over the backends of an operation "toy", with limits and times that need no measuring."""
    HandClock(monkeypatch, harness)
    monkeypatch.setattr(backends, "_BACKENDS", {})
    monkeypatch.setattr(sweep, "matmul_flops_per_s", lambda device, dtype: 1e12)
    monkeypatch.setattr(sweep, "copy_bytes_per_s", lambda device: 1e9)
    register(
        *(Backend("toy", name, lambda: None, "") for name in ("fast", "narrow", "eager")),
        Backend("toy", "absent", lambda: None, "", why_unavailable=lambda: "no GPU"),
        Backend("toy", "triton", lambda: None, ""),
    )
    return Sweep(name="toy", op="toy", size_label="elements", points=[point(4), point(16, bar=0.9)])


def test_every_backend_that_runs_is_timed_against_the_oracle(toy, capsys):
    found = {row.metric: row for row in measure(toy, "cpu")}
    assert set(found) == {
        "matmul rate", "copy rate", "ms/fast/4", "ms/narrow/4", "ms/eager/4", "ms/fast/16", "ms/eager/16"
    }  # fmt: skip
    fast, oracle = found["ms/fast/16"], found["ms/eager/16"]
    assert (fast.value, fast.ratio) == (pytest.approx(1), pytest.approx(1 / 4))
    assert (fast.baseline, fast.bar, fast.meets_bar) == ("eager", 0.9, True)
    assert oracle.ratio is None
    assert fast.shapes["backend"] == "fast"
    assert fast.shapes["elements"] == fast.shapes["size"] == 16
    assert fast.floor_pct == pytest.approx(100 * 1e3 * 16e6 / 1e12 / fast.value)
    assert "narrow left out: it takes 8 elements at most" in capsys.readouterr().out


def test_a_backend_that_disagrees_or_breaks_is_not_timed_and_the_others_are(toy, monkeypatch):
    register(Backend("toy", "wrong", lambda: None, ""), Backend("toy", "breaks", lambda: None, ""))
    kept = []
    with pytest.raises(sweep.Wrong, match=r"wrong: AssertionError: double disagrees.*breaks: KeyError"):
        measure(toy, "cpu", keep=lambda rows: kept.append(list(rows)))
    assert len(kept) == 2  # after each size
    metrics = {row.metric for row in kept[-1]}
    assert {"ms/fast/4", "ms/fast/16", "ms/eager/16"} <= metrics
    assert not any("wrong" in metric or "breaks" in metric for metric in metrics)


def test_the_budget_is_kept(toy, capsys):
    found = measure(toy, "cpu", budget_s=0.0)
    assert [row.metric for row in found] == ["matmul rate", "copy rate"]
    assert "no time left for size 4" in capsys.readouterr().out


def test_the_floor_is_the_larger_of_arithmetic_and_memory():
    rates = Rates(flops_per_s=1e12, bytes_per_s=1e9)
    assert rates.floor_ms(1e9, 0) == pytest.approx(1.0)
    assert rates.floor_ms(1e9, 5e6) == pytest.approx(5.0)


@dataclass
class Holder:
    tensors: list
    name: str = "x"


def test_inputs_are_rotated_out_of_the_cache():
    inputs = {"a": torch.zeros(10), "b": (torch.zeros(5, dtype=torch.float16), [Holder([torch.zeros(2)])]), "n": 3}
    assert bytes_of(inputs) == 40 + 10 + 8
    assert sets_needed(set_bytes=10, cache_bytes=25) == 5
    assert sets_needed(set_bytes=10**9, cache_bytes=25) == 2
    assert sets_needed(set_bytes=1, cache_bytes=10**6) == sweep.MAX_SETS


def test_pictures_are_drawn_the_same_twice_and_show_every_backend(toy, tmp_path):
    found = measure(toy, "cpu")
    first, second = plots.draw(found, tmp_path / "a"), plots.draw(found, tmp_path / "b")
    assert [path.name for path in first] == ["toy_time.svg", "toy_roofline.svg"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        text = one.read_text()
        assert all(name in text for name in ("fast", "narrow", "eager"))
    assert "floor of this machine" in first[0].read_text()
    assert plots.draw(found[:2], tmp_path) == []


TINY = {
    "infonce": (8, 12),
    "pool": (2, 3),
    "distill": (64, 96),
    "optimizer": (2, 3),
    "attention": (1, 2),
    "layer_norm": (2, 3),
}


@pytest.mark.parametrize("name", TINY)
def test_each_sweep_measures_its_operation(name, tmp_path, monkeypatch):
    """At sizes of a test: the points of the sweep are taken over, with inputs cut down."""
    monkeypatch.setattr(sweep, "matmul_flops_per_s", lambda device, dtype: 1e12)
    monkeypatch.setattr(sweep, "copy_bytes_per_s", lambda device: 1e10)
    planned = sweeps.SWEEPS[name]("cpu")
    make = planned.points[0].make_inputs
    cut = [replace(planned.points[0], size=n, make_inputs=partial(make.func, n)) for n in TINY[name]]
    monkeypatch.setitem(sweeps.SWEEPS, name, lambda device: replace(planned, points=cut))
    sweeps.run(name, "cpu", budget_s=3600.0, folder=tmp_path)
    found = json.loads((tmp_path / f"{name}_sweep.json").read_text())
    timed = {row["shapes"]["backend"] for row in found if row["metric"].startswith("ms/")}
    assert timed == set(sweep.backend_names(planned.op))
    assert timed & {"eager", "sdpa"}
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}_sweep.json", f"{name}_time.svg", f"{name}_roofline.svg"
    }  # fmt: skip


def test_benchmarks_offer_their_sweep(monkeypatch):
    asked = []
    monkeypatch.setattr(sweeps, "run", lambda name, device, budget_s: asked.append((name, device)))
    for order in (["--plot", "--device", "cpu"], ["--device", "cpu", "--plot"]):
        result = CliRunner().invoke(bench_infonce.command, order)
        assert result.exit_code == 0, result.output
    assert asked == [("infonce", "cpu")] * 2


def test_sizes_of_a_gpu_are_planned_without_one():
    for make in sweeps.SWEEPS.values():
        planned = make("cuda")
        sizes = [given.size for given in planned.points]
        assert sizes == sorted(sizes)
        assert all(given.flops > 0 and given.bytes > 0 and given.elements > 0 for given in planned.points)
    assert rows.slug("NVIDIA H200") == "nvidia-h200"
