"""The losses over real ranks: exact for any number of them, few collectives, the original's gradient on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos_fast.loss import ClipLoss, CosmosLoss, build_objective, objective
from cosmos_fast.utils.collectives import ALL_GATHER, REDUCE_SCATTER
from cosmos_fast.utils.errors import UserError
from tests.distributed.loss_runs import DIM, GLOBAL_BATCH, POISONED, SCALES, run_loss, run_rank
from tests.ranks import run_ranks
from tests.tiny_run import tiny_config

WORLDS = (2, 4)


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank found."""
    folder = tmp_path_factory.mktemp(f"loss_{request.param}")
    run_ranks(run_rank, request.param, str(folder))
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(request.param)]


def added_up(ranks: list[dict[str, Any]], run: str) -> dict[str, Tensor]:
    """Gradients of the whole batch: samples side by side, those of the scales summed."""
    parts = [rank[run]["gradients"] for rank in ranks]
    return {
        name: torch.stack([part[name] for part in parts]).sum(0)
        if name in SCALES
        else torch.cat([part[name] for part in parts], dim=1)
        for name in parts[0]
    }


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("run", ["cosmos", "large logits", "clip"])
def test_ranks_add_up_to_one_process(run: str, ranks: list[dict[str, Any]]) -> None:
    expected = run_loss(run, slice(None), None)
    assert expected["calls"] == {}
    for rank in ranks:
        torch.testing.assert_close(rank[run]["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
        assert torch.equal(rank[run]["losses"], ranks[0][run]["losses"])
    found = added_up(ranks, run)
    assert found.keys() == expected["gradients"].keys()
    for name, grad in expected["gradients"].items():
        assert off(found[name], grad) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("run", ["cosmos", "clip"])
def test_the_original_weakens_the_towers_and_not_the_scales(run: str, ranks: list[dict[str, Any]]) -> None:
    exact = added_up(ranks, run)
    found = added_up(ranks, "original" if run == "cosmos" else "original clip")
    assert found.keys() == exact.keys()
    for name, grad in exact.items():
        assert off(found[name], grad if name in SCALES else grad / len(ranks)) < 1e-6, name


@pytest.mark.slow
def test_on_request_the_gradient_is_the_originals(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank["original"]["losses"], rank["theirs"]["losses"], rtol=1e-5, atol=1e-6)
        for name, grad in rank["theirs"]["gradients"].items():
            if name not in SCALES:
                assert off(rank["original"]["gradients"][name], grad) < 1e-5, name
    found = added_up(ranks, "original")
    for name in SCALES:
        assert float(found[name]) == pytest.approx(float(ranks[0]["theirs"]["gradients"][name]), rel=1e-5)


@pytest.mark.parametrize(("recipe", "kind"), [("demo", CosmosLoss), ("demo_clip", ClipLoss)])
def test_a_run_says_which_gradient_it_wants(recipe: str, kind: type, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, recipe=recipe)
    loss = build_objective(config)
    assert type(loss) is kind
    assert (loss.tower_gradients, loss.traffic.total_calls) == ("exact", 0)
    config = tiny_config(tmp_path, "run.tower_gradients=original", recipe=recipe)
    assert build_objective(config).tower_gradients == "original"
    with pytest.raises(UserError, match=r"'run\.tower_gradients' is 'half'"):
        tiny_config(tmp_path, "run.tower_gradients=half")


@pytest.mark.slow
def test_collectives_and_bytes_of_a_step(ranks: list[dict[str, Any]]) -> None:
    world = len(ranks)
    received = GLOBAL_BATCH * (world - 1) // world  # samples of other ranks
    for rank in ranks:
        assert rank["theirs"]["calls"] == {"all_gather": 160}
        assert rank["theirs"]["bytes"] == 160 * received * 4 * DIM
        assert sum(rank["cosmos"]["calls"].values()) == 5
        assert rank["cosmos"]["calls"] == {
            "gather of columns": 2,
            "exchange of log-sum-exps": 1,
            "gather of log-sum-exps": 1,
            "reduce-scatter of gradients": 1,
        }
        assert rank["theirs"]["bytes"] > 23 * rank["cosmos"]["bytes"]
        assert rank["theirs"]["bytes"] > 30 * rank["half"]["bytes"]
        assert sum(rank["clip"]["calls"].values()) == 4


@pytest.mark.slow
def test_half_precision_costs_what_it_costs_on_one_process(ranks: list[dict[str, Any]], monkeypatch) -> None:
    exact = run_loss("cosmos", slice(None), None)
    monkeypatch.setattr(objective, "_operand_dtype", lambda device: torch.float16)
    whole = run_loss("cosmos", slice(None), None)
    found = added_up(ranks, "half")
    for name, grad in whole["gradients"].items():
        assert off(grad, exact["gradients"][name]) > 1e-5, name  # it does round
        assert off(found[name], grad) < 1e-5, name


@pytest.mark.slow
def test_what_is_not_a_number_on_one_rank_is_none_on_all(ranks: list[dict[str, Any]]) -> None:
    """So that all of them leave out the same step."""
    for rank in ranks:
        assert {name: nan for name, (nan, _) in rank["poisoned"].items()} == dict.fromkeys(POISONED, True)
        assert all(rank["poisoned"][name][1] for name in ("teacher image", "teacher text"))


@pytest.mark.slow
def test_what_can_wait_goes_on_beside_the_work(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["diary"] == [
            f"{ALL_GATHER}, communication",  # the teacher's, under way while the student works
            "the student, none",
            f"{ALL_GATHER}, communication",  # of images, under way during the other term
            f"wait for {ALL_GATHER}, communication",
            *["log_sum_exps of 8 views, none"] * 2,
            f"wait for {ALL_GATHER}, communication",
            "log_sum_exps of 8 views, none",
            "all_to_all_single, communication",
            f"{ALL_GATHER}, communication",
            f"wait for {ALL_GATHER}, communication",
            "backward, none",
            "feature_gradients of 8 views, none",
            f"{REDUCE_SCATTER}, communication",  # under way during the other term
            *["feature_gradients of 8 views, none"] * 2,
            f"wait for {REDUCE_SCATTER}, communication",
        ]
