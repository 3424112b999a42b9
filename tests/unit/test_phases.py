"""The phase clock: exclusive times that sum to the wall, on a CPU and, with events stood in for, on CUDA."""

from __future__ import annotations

import time

import pytest
import torch

from cosmos_fast.engine import phases
from cosmos_fast.engine.phases import OTHER, PHASES, Ledger, PhaseTimer, no_clock
from cosmos_fast.utils import peak_rates
from cosmos_fast.utils.peak_rates import matmul_flops_per_s, measured_rate, peak_rate, published_peak

CPU = torch.device("cpu")


def sleep_ms(length: float) -> None:
    time.sleep(length / 1e3)


def test_phases_sum_to_the_wall_time_that_another_clock_saw() -> None:
    timer = PhaseTimer(CPU)
    with timer("data"):  # before start(): forgotten
        sleep_ms(30)
    begin = time.perf_counter()
    timer.start()
    for _ in range(2):
        with timer("data"):
            sleep_ms(4)
        sleep_ms(2)
        for _ in range(2):  # micro-batches: a phase comes back within a step
            with timer("student"):
                sleep_ms(3)
    ledger = timer.stop(steps=2)
    seen_ms = 1e3 * (time.perf_counter() - begin) / 2
    assert list(ledger.phase_ms) == [*PHASES, OTHER]
    assert sum(ledger.phase_ms.values()) == pytest.approx(ledger.wall_ms, rel=1e-9)
    assert 0.8 * seen_ms <= ledger.wall_ms <= seen_ms
    assert ledger.phase_ms["data"] >= 4
    assert ledger.phase_ms["student"] >= 6
    assert ledger.phase_ms[OTHER] >= 2
    assert ledger.phase_ms["teacher"] == 0
    assert sum(map(ledger.share_pct, ledger.phase_ms)) == pytest.approx(100)


def test_a_phase_inside_another_counts_once() -> None:
    timer = PhaseTimer(CPU)
    timer.start()
    with timer("loss"):
        sleep_ms(2)
        with timer("communication"):
            sleep_ms(8)
        sleep_ms(2)
    ledger = timer.stop(steps=1)
    assert ledger.phase_ms["communication"] >= 8
    assert ledger.phase_ms["loss"] >= 4
    assert sum(ledger.phase_ms.values()) == pytest.approx(ledger.wall_ms)


def test_an_error_closes_its_phase() -> None:
    timer = PhaseTimer(CPU)
    timer.start()
    with pytest.raises(KeyError), timer("loss"):
        raise KeyError
    sleep_ms(3)
    assert timer.stop(1).phase_ms[OTHER] >= 3


def test_unknown_phases_are_a_mistake_with_either_clock() -> None:
    for clock in (no_clock, PhaseTimer(CPU)):
        with pytest.raises(AssertionError):
            clock("lunch")


class FakeEvent:
    """An event of a GPU that keeps up with its host."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at_ms = float("nan")

    def record(self, stream: object) -> None:
        self.at_ms = 1e3 * time.perf_counter()

    def elapsed_time(self, later: FakeEvent) -> float:
        return later.at_ms - self.at_ms


def test_on_cuda_events_are_recorded_and_nothing_waits_between_start_and_stop(monkeypatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(phases.torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(phases.torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(phases.torch.cuda, "synchronize", lambda device: waits.append(time.perf_counter()))
    timer = PhaseTimer(torch.device("cuda"))
    timer.start()
    assert len(waits) == 1
    with timer("teacher"):
        sleep_ms(3)
    with timer("student"):
        sleep_ms(5)
    assert len(waits) == 1
    ledger = timer.stop(steps=1)
    assert len(waits) == 2
    assert ledger.phase_ms["teacher"] >= 3
    assert ledger.phase_ms["student"] >= 5
    assert sum(ledger.phase_ms.values()) == pytest.approx(ledger.wall_ms)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_the_work_counts_to_its_phase_although_the_host_has_gone_on() -> None:
    timer = PhaseTimer(torch.device("cuda"))
    timer.start()
    with timer("student"):
        torch.cuda._sleep(50_000_000)
    with timer("loss"):
        pass
    ledger = timer.stop(1)
    assert ledger.phase_ms["student"] > 10
    assert ledger.phase_ms["loss"] < 1
    assert sum(ledger.phase_ms.values()) == pytest.approx(ledger.wall_ms)
    assert ledger.phase_ms[OTHER] < 0.2 * ledger.wall_ms


@pytest.mark.parametrize(
    ("device", "operands", "tera"),
    [
        ("NVIDIA A100-SXM4-40GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "fp16", 756),
        ("NVIDIA H200", "fp8", 1978.9),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA H20", "bf16", 148),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A100-SXM4-40GB", "fp8", None),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16", None),
        ("Some Card of Tomorrow", "bf16", None),
    ],
)
def test_published_peaks_are_found_by_the_name_that_torch_gives(device: str, operands: str, tera: float | None) -> None:
    found = published_peak(device, operands)
    assert (None if found is None else found.flops_per_s / 1e12) == (tera and pytest.approx(tera))
    assert found is None or device in found.source


def test_a_cpu_has_no_published_peak_and_says_that_its_rate_is_measured(monkeypatch) -> None:
    assert peak_rate(CPU, "fp32") is None
    before = torch.get_rng_state()
    rate = matmul_flops_per_s("cpu", torch.float32, seconds=0.05)
    assert 1e8 < rate < 1e14
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr(peak_rates, "matmul_flops_per_s", lambda device, dtype: 1e12)
    assert measured_rate(CPU, "fp32").source.startswith("measured: the fastest of a second of fp32 matrix products")


def test_shares_are_percent() -> None:
    assert Ledger({"data": 1.0, OTHER: 3.0}, 4.0, 1).share_pct("data") == 25.0
