"""`bench ranks` on a tiny model: every kind of row, and the counts among them."""

from __future__ import annotations

import pytest

from benchmarks import bench_ranks
from benchmarks.bench_ranks import Setting
from benchmarks.rank_steps import Case
from benchmarks.rows import Row
from tests.tiny_run import TINY

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.long]  # starts ranks six times

MODEL = tuple(text for text in TINY if text.startswith(("model.", "data.")))
BOTH = (Case(1), Case(1, "parts"))


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    """By metric."""
    setting = Setting(batch=4, repeats=2, more=MODEL, rate_s=0.02)
    alone = [*bench_ranks.machine(setting, 1), *bench_ranks.steps(setting, 1, (Case(None),))]
    machine, losses = bench_ranks.machine(setting, 2), bench_ranks.losses(setting, 2)
    found = [*alone, *machine, *losses, *bench_ranks.steps(setting, 2, BOTH), *bench_ranks.costs(setting, 2, BOTH)]
    return {row.metric: row for row in found}


def test_the_losses_send_little_in_few_collectives(rows: dict[str, Row]) -> None:
    """Their gradients were held to the original's before anything was counted."""
    assert rows["original_loss_collectives/2 ranks"].value == 160
    assert rows["loss_collectives/2 ranks"].value == 5
    assert rows["loss_received_kib/2 ranks"].ratio < 1 / 23
    assert rows["loss_received_kib/2 ranks, bf16"].ratio < 1 / 30
    assert all(row.meets_bar for row in rows.values() if row.bar is not None)


def test_a_teacher_in_parts_is_sent_in_more_pieces(rows: dict[str, Row]) -> None:
    """Of the same bytes but for poolers, which the forward pass does not need. The plan counts both."""
    whole, parts = (rows[f"collectives/2 ranks, {case.name}"].value for case in BOTH)
    units = 2 * 2 + 2  # blocks of both towers, and what is around them
    assert whole - 3 + units <= parts <= whole - 3 + 2 * units  # each unit lies on one rank or two
    assert 0.8 < rows["received_mib/2 ranks, stage 1, teacher parts"].ratio < 1.0
    for case in BOTH:
        assert rows[f"plan_received_mib/2 ranks, {case.name}"].ratio == pytest.approx(1.0, abs=0.03)


def test_times_and_what_the_plan_says_of_them(rows: dict[str, Row]) -> None:
    for case in BOTH:
        assert rows[f"step_ms/2 ranks, {case.name}"].value > 0
        assert rows[f"plan_step_ms/2 ranks, {case.name}"].value > 0
    assert 0 < rows["mfu_pct/1 rank"].value <= 100
    assert rows["rate_link_gb_s/2 ranks"].value > 0
