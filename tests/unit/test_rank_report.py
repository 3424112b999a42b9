"""Numbers over ranks: means, sums, spread, who is slow and who waits; the clock that adds up collectives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from cosmos_fast.engine.communication import CommunicationClock, time_collectives
from cosmos_fast.engine.rank_report import RankReport, RankTimes, described
from cosmos_fast.utils import phases
from cosmos_fast.utils.memory import MIB
from tests.hand_clock import HandClock, HandStreams


def times(**changes: float) -> RankTimes:
    usual = {"samples": 40, "data_ms": 10.0, "step_ms": 390.0, "communication_ms": 200.0}
    rest = {"peak_bytes": 100 * MIB, "flops": 1e9, "flops_done": 5e9, "bad_samples": 1}
    return RankTimes(**{**usual, **rest, **changes})  # type: ignore[arg-type]


# Rank 1 computes for twice as long as rank 0; rank 2 waits for data for 200 ms and is the slowest.
RANKS = [
    times(),
    times(step_ms=390, communication_ms=20, peak_bytes=300 * MIB, bad_samples=0),
    times(data_ms=210, step_ms=190, communication_ms=8, flops_done=7e9, peak_bytes=50 * MIB),
]


def test_every_number_by_hand() -> None:
    found = RankReport(RANKS, steps=4).numbers(peak_flops_per_s=1e10)
    assert found == pytest.approx(
        {
            "step_ms": (390 + 390 + 190) / 3 / 4,
            "data_ms": 230 / 3 / 4,
            "samples_per_s": 120 / 0.4,
            "data_stall_pct": 100 * (230 / 3) / 400,
            "communication_ms": 228 / 3 / 4,
            "wait_ms": (228 / 3 - 8) / 4,
            "slowest_rank": 2,
            "samples_per_s_slowest_rank": 40 / 0.392,
            "samples_per_s_fastest_rank": 40 / 0.2,
            "data_ms_slowest_rank": 210 / 4,
            "data_slowest_rank": 2,
            "mfu_pct": 100 * 1e9 / (1e10 * 0.4),
            "peak_memory_mib": 300,
            "peak_memory_rank": 1,
            "least_peak_memory_mib": 50,
            "bad_samples": 2,
            "flops": 17e9,
        }
    )
    assert described(found) == "communication 19 % (waiting 17 %, rank 2 slowest)  "


def test_one_process_waits_for_nobody() -> None:
    found = RankReport([times(communication_ms=0.0)], steps=1).numbers()
    assert not [name for name in found if "rank" in name or "wait" in name or "communication" in name or "mfu" in name]
    assert described(found) == ""


def test_only_what_steps_send_counts_and_what_lies_inside_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hand = HandClock(monkeypatch, phases)
    entered: list[str] = []

    @contextmanager
    def inner(phase: str) -> Iterator[None]:
        entered.append(phase)
        yield

    clock = CommunicationClock(torch.device("cpu"), inner)
    with clock("communication"):  # a checkpoint, before the step
        hand.pass_ms(1000)
    clock.begin_step()
    with clock("backward"):
        hand.pass_ms(50)
        with clock("communication"):
            hand.pass_ms(3)
            with clock("communication"):
                hand.pass_ms(4)
    clock.end_step()
    with clock("communication"):  # the metrics, after it
        hand.pass_ms(1000)
    clock.begin_step()
    with clock("communication"):
        hand.pass_ms(8)
    clock.end_step()
    assert clock.take_ms() == pytest.approx(15)
    assert clock.take_ms() == 0
    assert entered == ["communication", "backward", *["communication"] * 4]


def test_on_cuda_what_is_sent_beside_computing_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    hand = HandClock(monkeypatch, phases)
    streams = HandStreams(monkeypatch, hand)
    clock = CommunicationClock(torch.device("cuda"))
    with clock("communication"):  # before the first step there is no stream to count in
        hand.pass_ms(1000)
    clock.begin_step()
    with streams.current("side"), clock("communication"):  # as with overlap_comm
        hand.pass_ms(90)
    with clock("communication"):
        hand.pass_ms(5)
        with streams.current("side"), clock("communication"):
            streams.late_ms["side"] = 700
            hand.pass_ms(1)
    clock.end_step()
    assert clock.take_ms() == pytest.approx(6)
    assert len(streams.waits) == 1
    with streams.current("side"):  # a process may compute in a stream of its own
        clock.begin_step()
        with clock("communication"):
            hand.pass_ms(3)
        clock.end_step()
    assert clock.take_ms() == pytest.approx(3)


def test_collectives_of_a_backend_are_told_to_the_newest_clock_only(monkeypatch: pytest.MonkeyPatch) -> None:
    hand = HandClock(monkeypatch, phases)

    class Work:
        kind = "work"

        def wait(self, timeout: float | None = None) -> str:
            hand.pass_ms(30)
            return f"waited {timeout}"

    class Backend:
        def all_reduce(self, tensor: str, async_op: bool = False) -> Any:
            hand.pass_ms(2)
            return Work() if async_op else tensor

        def get_rank(self) -> int:
            return 3

    backend = Backend()
    old, new = CommunicationClock(torch.device("cpu")), CommunicationClock(torch.device("cpu"))
    for clock in (old, new):
        time_collectives(backend, clock)
        clock.begin_step()
    assert backend.all_reduce("x") == "x"
    work = backend.all_reduce("x", async_op=True)
    hand.pass_ms(500)  # what is done meanwhile is no communication
    assert work.kind == "work"
    assert work.wait(5.0) == "waited 5.0"
    assert backend.get_rank() == 3
    for clock, expected in ((old, 0.0), (new, 34.0)):
        clock.end_step()
        assert clock.take_ms() == pytest.approx(expected)
