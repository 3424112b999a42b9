"""The benchmark harness: pairing, order of events, peak memory, rows on disk, and the command in front of it."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from benchmarks import bench_infonce, bench_pool, bench_step, harness, rows
from benchmarks.eager_cosmos import EagerTrainer
from benchmarks.harness import Timing, assert_agree, exact_fp32, interleave, ledger
from benchmarks.memory import peak_mib
from benchmarks.rows import Row
from benchmarks.shapes import mini_step
from cosmos_fast.cli import bench
from cosmos_fast.cli.main import run
from cosmos_fast.utils import memory
from tests.hand_clock import HandClock
from tests.ranks import PRELOADED

ROW = Row(
    name="toy",
    device="Some CPU, 2 threads",
    shapes={"batch": 2},
    metric="step_ms",
    value=1.23456789,
    unit="ms",
    baseline="eager",
    ratio=0.5,
    bar=0.65,
    commit="abc",
    versions={"torch": "2"},
)


def test_ratio_is_the_median_of_pairs_and_not_a_ratio_of_medians() -> None:
    timing = Timing(baseline_ms=[10.0, 20.0, 400.0], candidate_ms=[5.0, 30.0, 100.0])
    assert timing.ratios == [0.5, 1.5, 0.25]
    assert timing.ratio == 0.5  # the medians would say 1.5


def test_both_sides_get_the_same_fresh_inputs_in_alternating_order() -> None:
    calls: list[tuple[str, int]] = []
    timing = interleave(
        lambda seed: calls.append(("baseline", seed)),
        lambda seed: calls.append(("candidate", seed)),
        lambda seed: seed,
        check=lambda: calls.append(("check", -1)),
        repeats=7,
        warmup=1,
    )
    assert calls[0] == ("check", -1)
    assert calls[1:5] == [("baseline", 0), ("candidate", 0), ("candidate", 1), ("baseline", 1)]
    assert [seed for name, seed in calls if name == "candidate"] == list(range(8))
    assert len(timing.baseline_ms) == len(timing.candidate_ms) == 7  # the warm-up is not among them


def test_a_slower_candidate_has_a_ratio_above_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HandClock(monkeypatch, harness)

    def work_ms(length: float, seed: int) -> None:
        clock.pass_ms(length + seed)

    timing = interleave(partial(work_ms, 5), partial(work_ms, 20), int, check=lambda: None, repeats=7, warmup=0)
    assert timing.baseline_ms == pytest.approx([5 + seed for seed in range(7)])
    assert timing.candidate_ms == pytest.approx([20 + seed for seed in range(7)])
    assert timing.ratio == pytest.approx(23 / 8)
    low, high = timing.spread
    assert low < timing.ratio < high


def test_the_clock_of_a_cpu_is_the_wall_clock() -> None:
    timing = interleave(int, lambda _: time.sleep(0.002), int, check=lambda: None, warmup=0)
    assert min(timing.candidate_ms) >= 2


def test_nothing_is_timed_when_the_sides_disagree() -> None:
    def disagree() -> None:
        raise AssertionError("they differ")

    timed: list[int] = []
    with pytest.raises(AssertionError, match="they differ"):
        interleave(timed.append, timed.append, int, check=disagree)
    assert not timed


def test_too_few_repetitions_are_refused() -> None:
    with pytest.raises(AssertionError, match="too few"):
        interleave(int, int, int, check=lambda: None, repeats=6)


def test_agreement_is_measured_against_the_largest_entry_and_names_the_worst_tensor() -> None:
    expected = {"small": torch.tensor([1e-6, 1.0]), "large": torch.tensor([100.0, 1.0])}
    assert_agree({"small": torch.tensor([5e-6, 1.0]), "large": torch.tensor([100.0, 1.0004])}, expected, rtol=1e-5)
    with pytest.raises(AssertionError, match="large disagrees"):
        assert_agree({"small": expected["small"], "large": torch.tensor([100.0, 1.2])}, expected, rtol=1e-5)
    with pytest.raises(AssertionError, match="disagrees"):
        assert_agree({"small": torch.tensor([math.nan, 1.0]), "large": expected["large"]}, expected, rtol=1e-5)
    with pytest.raises(AssertionError, match="only one side"):
        assert_agree({"small": expected["small"]}, expected, rtol=1e-5)


def test_the_ledger_sums_to_the_wall_time() -> None:
    def phases(seed: int) -> Iterator[str]:
        time.sleep(0.004)
        yield "first"
        time.sleep(0.008)
        yield "second"
        time.sleep(0.003)

    found = ledger({"only": phases}, device="cpu", repeats=3, warmup=1)["only"]
    assert list(found) == ["first", "second", "other", "wall"]
    assert found["first"] + found["second"] + found["other"] == pytest.approx(found["wall"])
    assert found["first"] >= 4
    assert found["second"] >= 8
    assert found["other"] >= 3


def touch_mib(size: int) -> None:
    # Two passes, the second smaller: the peak must be that of the first although it is freed.
    for share in (size, size // 4):
        block = torch.ones(share * 2**18)
        del block


def test_peak_memory_counts_what_was_freed_again_and_not_what_was_there_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = multiprocessing.get_context("forkserver")  # as fresh as a spawned one, with torch imported
    context.set_forkserver_preload(PRELOADED)
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: context)
    work = partial(touch_mib, 96)
    peak = peak_mib(work, settle=partial(touch_mib, 1))
    assert 90 <= peak <= 110
    # A settling run that needed more must not hide the work's peak.
    if (memory.PROC / "clear_refs").exists():
        assert 90 <= peak_mib(work, settle=partial(touch_mib, 192)) <= 110


def explode() -> None:
    raise ValueError("broken work")


def test_a_failing_measurement_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="died"):
        peak_mib(explode)
    assert "broken work" in capfd.readouterr().err


def test_rows_are_written_whole_with_every_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    path = rows.write([ROW, replace(ROW, metric="peak_mib", ratio=0.9, floor_pct=12.5)])
    assert path == tmp_path / "some-cpu-2-threads" / "toy.json"
    first, second = json.loads(path.read_text())
    assert list(first) == list(second) == [field.name for field in fields(Row)]
    assert len(first) == 12
    assert first["value"] == 1.2346
    assert second["floor_pct"] == 12.5
    assert [entry.name for entry in path.parent.iterdir()] == ["toy.json"]


def test_the_bar_is_judged_by_the_ratio() -> None:
    assert replace(ROW, ratio=0.65).meets_bar
    assert replace(ROW, ratio=0.66).meets_bar is False
    assert replace(ROW, bar=None).meets_bar is None
    console = Console(width=160, record=True)
    rows.show([ROW, replace(ROW, metric="peak_mib", ratio=0.9)], console)
    text = console.export_text()
    assert "0.65 met" in text
    assert "0.65 MISSED" in text


def test_versions_and_commit_describe_the_run() -> None:
    assert rows.versions()["torch"] == torch.__version__
    assert rows.commit()


def test_inputs_of_a_step_have_the_lengths_that_the_shape_says() -> None:
    shape = mini_step(batch=5)
    texts = shape.texts(seed=3)
    assert texts.shape == (8, 5, 77)
    lengths = texts.argmax(-1) + 1
    assert (texts.max(-1).values == shape.model.vocab_size - 1).all()
    assert ((texts > 0).sum(-1) == lengths).all()
    assert ((lengths[:2] >= 30) & (lengths[:2] <= 70)).all()
    assert ((lengths[2:] >= 10) & (lengths[2:] <= 35)).all()
    assert [tuple(crop.shape[2:]) for crop in shape.images(0)] == [(64, 64)] * 2 + [(32, 32)] * 6
    assert not torch.equal(texts, shape.texts(seed=4))
    assert torch.equal(texts, shape.texts(seed=3))


def test_a_whole_step_is_measured_after_both_sides_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "matmul_flops_per_s", lambda device, dtype: 1e11)
    out = tmp_path / "step.json"
    arguments = ["step", "--width", "64", "--layers", "1", "--batch", "2", "--device", "cpu"]
    result = CliRunner().invoke(bench.command, [*arguments, "--no-memory", "--profile", "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = {row["metric"]: row for row in json.loads(out.read_text())}
    phases = ["teacher", "student", "loss", "backward", "optimizer", "other"]
    total = sum(found[f"phase_ms/{name}"]["value"] for name in phases)
    assert total == pytest.approx(found["phase_ms/wall"]["value"], rel=1e-3)
    assert found["step_ms"]["shapes"]["batch"] == 2
    assert found["step_ms"]["bar"] == 0.65
    assert found["step_ms"]["ratio"] > 0
    assert 0 < found["step_ms"]["floor_pct"] < 100


@exact_fp32()
def _say_what_is_allowed() -> None:
    raise AssertionError(f"found {torch.backends.cudnn.allow_tf32}, {torch.get_float32_matmul_precision()}")


@pytest.mark.parametrize("before", ["highest", "high"])
def test_exact_fp32_puts_back_what_it_found_whatever_happens(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision(before)
    try:
        with pytest.raises(AssertionError, match="found False, highest"):
            _say_what_is_allowed()
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (True, before)
    finally:
        torch.set_float32_matmul_precision(usual)


def test_a_step_that_disagrees_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EagerTrainer, "update_teacher", lambda self: None)  # the teacher stays behind
    setting = bench_step.Setting("toy", mini_step(width=64, layers=1, batch=2), "cpu", "fp32")
    with pytest.raises(AssertionError, match="distillation loss disagrees"):
        bench_step.check_agreement(setting)


def test_the_single_operations_agree_with_the_eager_port_in_double_precision() -> None:
    bench_infonce.check(batch=3, dim=17, device="cpu", backend="auto")
    bench_pool.check(5, bench_pool.Setting(batch=1, dim=24, device="cpu", backend="auto", repeats=7))


def test_the_command_lists_the_benchmarks() -> None:
    result = CliRunner().invoke(bench.command, ["--help"])
    assert result.exit_code == 0
    assert "step" in result.output


def test_an_installed_package_without_a_checkout_gets_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    assert run(bench.command, ["step"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: benchmarks are not part of the installed package")
    assert errors.count("\n") == 1
