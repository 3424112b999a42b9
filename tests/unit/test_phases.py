"""The phase clock: exclusive times that sum to the wall, on a CPU and, with events stood in for, on CUDA."""

from __future__ import annotations

import time

import pytest
import torch

from cosmos_fast.engine.communication import CommunicationClock
from cosmos_fast.utils import peak_rates, phases
from cosmos_fast.utils.peak_rates import matmul_flops_per_s, measured_rate, peak_rate, published_peak
from cosmos_fast.utils.phases import OTHER, PHASES, Ledger, PhaseTimer, no_clock
from tests.hand_clock import HandClock, HandStreams

CPU = torch.device("cpu")


@pytest.fixture
def hand_clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    return HandClock(monkeypatch, phases)


def check(ledger: Ledger, wall_ms: float, **phase_ms: float) -> None:
    """Those phases took so long, the others nothing, and what is left of the wall time is "other"."""
    assert ledger.wall_ms == pytest.approx(wall_ms)
    expected = dict.fromkeys(PHASES, 0.0) | phase_ms
    assert ledger.phase_ms == pytest.approx({**expected, OTHER: wall_ms - sum(phase_ms.values())}, abs=1e-6)
    assert list(ledger.phase_ms) == [*PHASES, OTHER]


def test_phases_and_the_rest_sum_to_the_wall_time_of_an_average_step(hand_clock: HandClock) -> None:
    timer = PhaseTimer(CPU)
    with timer("data"):  # before start(): forgotten
        hand_clock.pass_ms(30)
    timer.start()
    for _ in range(2):
        with timer("data"):
            hand_clock.pass_ms(4)
        hand_clock.pass_ms(2)
        for _ in range(2):  # micro-batches: a phase comes back within a step
            with timer("student"):
                hand_clock.pass_ms(3)
    ledger = timer.stop(steps=2)
    check(ledger, wall_ms=12, data=4, student=6)
    assert ledger.share_pct("student") == pytest.approx(50)
    timer.start()  # and anew
    hand_clock.pass_ms(1)
    check(timer.stop(steps=1), wall_ms=1)


def test_a_phase_inside_another_counts_once(hand_clock: HandClock) -> None:
    timer = PhaseTimer(CPU)
    timer.start()
    with timer("loss"):
        hand_clock.pass_ms(2)
        with timer("communication"):
            hand_clock.pass_ms(8)
        hand_clock.pass_ms(3)
    hand_clock.pass_ms(1)
    check(timer.stop(steps=1), wall_ms=14, loss=5, communication=8)


def test_an_error_closes_its_phase(hand_clock: HandClock) -> None:
    timer = PhaseTimer(CPU)
    timer.start()
    with timer("backward"):
        hand_clock.pass_ms(5)
        with pytest.raises(KeyError), timer("loss"):
            raise KeyError
        hand_clock.pass_ms(2)
    hand_clock.pass_ms(3)
    check(timer.stop(steps=1), wall_ms=10, backward=7)


def test_the_clock_is_the_wall_clock() -> None:
    timer = PhaseTimer(CPU)
    begin = time.perf_counter()
    timer.start()
    with timer("data"):
        time.sleep(0.004)
    ledger = timer.stop(steps=1)
    assert 4 <= ledger.phase_ms["data"] <= ledger.wall_ms <= 1e3 * (time.perf_counter() - begin)


def test_unknown_phases_are_a_mistake_with_either_clock() -> None:
    for clock in (no_clock, PhaseTimer(CPU)):
        with pytest.raises(AssertionError):
            clock("lunch")


def test_on_cuda_events_are_recorded_and_nothing_waits_between_start_and_stop(
    hand_clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = HandStreams(monkeypatch, hand_clock).waits
    timer = PhaseTimer(torch.device("cuda"))
    timer.start()
    assert len(waits) == 1
    with timer("teacher"):
        hand_clock.pass_ms(3)
    with timer("student"):
        hand_clock.pass_ms(5)
    hand_clock.pass_ms(1)
    assert len(waits) == 1
    ledger = timer.stop(steps=1)
    assert len(waits) == 2
    check(ledger, wall_ms=9, teacher=3, student=5)


def test_a_phase_in_another_stream_goes_on_beside_the_one_around_it(
    hand_clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = HandStreams(monkeypatch, hand_clock)
    timer = PhaseTimer(torch.device("cuda"))
    timer.start()
    with timer("backward"):
        hand_clock.pass_ms(4)
        with streams.current("side"), timer("communication"):
            streams.late_ms["side"] = 700  # that stream is behind
            hand_clock.pass_ms(1)
        hand_clock.pass_ms(3)
        with timer("communication"):
            hand_clock.pass_ms(2)
    check(timer.stop(steps=1), wall_ms=10, backward=8, communication=2)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_what_another_stream_does_is_hidden() -> None:
    device, side = torch.device("cuda"), torch.cuda.Stream()
    timer = PhaseTimer(device)
    clock = CommunicationClock(device, timer)
    timer.start()
    clock.begin_step()
    with clock("backward"):
        torch.cuda._sleep(50_000_000)
        with torch.cuda.stream(side), clock("communication"):
            torch.cuda._sleep(50_000_000)
    clock.end_step()
    ledger = timer.stop(1)
    assert ledger.phase_ms["backward"] > 10
    assert clock.take_ms() == ledger.phase_ms["communication"] == 0


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


@pytest.mark.parametrize(("tf32", "tera"), [(False, 19.5), (True, 156)])
def test_fp32_products_of_a_gpu_count_as_what_torch_runs_them_in(tf32: bool, tera: float, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(peak_rates, "_tf32_allowed", lambda: tf32)
    found = {precision: peak_rate(torch.device("cuda:0"), precision) for precision in ("fp32", "bf16", "fp8")}
    rates = [None if rate is None else rate.flops_per_s / 1e12 for rate in found.values()]
    assert rates == [pytest.approx(tera), pytest.approx(312), None]


def test_whether_tf32_is_allowed_is_what_torch_was_told() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for setting, allowed in (("highest", False), ("high", True)):
            torch.set_float32_matmul_precision(setting)
            assert peak_rates._tf32_allowed() is allowed
    finally:
        torch.set_float32_matmul_precision(before)


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
