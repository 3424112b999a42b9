"""The losses over real ranks: exact for any number of them, few collectives, the original's gradient on request.

Axes: V views, B per-rank batch, G global batch, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cosmos_fast.loss import ClipLoss, CosmosLoss, CosmosLossOutput, objective
from cosmos_fast.model import CosmosFeatures, TeacherFeatures
from cosmos_fast.ops import infonce_tiled
from cosmos_fast.utils.collectives import ALL_GATHER, REDUCE_SCATTER, Collectives, Traffic
from cosmos_fast.utils.ranks import joined_ranks
from tests.ranks import run_ranks

WORLDS = (2, 4)
GLOBAL_BATCH, DIM = 8, 512  # the embedding of every published model: shares of bytes are those of real runs
FEATURES = {"image": 8, "text": 8, "image_crossmodal": 8, "text_crossmodal": 8}
TEACHER = {"image": 2, "text": 2}
SCALES = {"logit_scale": 14.3, "distill_logit_scale": 20.0}
LARGE = {"logit_scale": 3000.0, "distill_logit_scale": 1e6}  # exp() of such logits is no fp32 number
# Name of a run: objective, scales, arguments of the objective.
RUNS: dict[str, tuple[str, dict[str, float], dict[str, Any]]] = {
    "cosmos": ("cosmos", SCALES, {}),
    "large logits": ("cosmos", LARGE, {}),
    "clip": ("clip", SCALES, {}),
    "original": ("cosmos", SCALES, {"tower_gradients": "original"}),
    "original clip": ("clip", SCALES, {"tower_gradients": "original"}),
}


def _views(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, GLOBAL_BATCH, DIM, generator=generator), dim=-1)


def _inputs(own: slice, scales: dict[str, float], clip: bool) -> tuple[CosmosFeatures, TeacherFeatures]:
    """Features of these samples, as leaves."""
    leaves: dict[str, Any] = {}
    for seed, (name, count) in enumerate(FEATURES.items()):
        crossmodal = name.endswith("crossmodal")
        leaves[name] = None if clip and crossmodal else _views(count, seed)[:, own].clone().requires_grad_()
    leaves |= {name: torch.tensor(value, requires_grad=True) for name, value in scales.items()}
    teacher = {name: _views(count, 10 + seed)[:, own] for seed, (name, count) in enumerate(TEACHER.items())}
    return CosmosFeatures(**leaves), TeacherFeatures(**teacher)


def _outcome(student: CosmosFeatures, losses: CosmosLossOutput, traffic: Traffic) -> dict[str, Any]:
    losses.total.backward()
    gradients = {name: leaf.grad for name, leaf in vars(student).items() if leaf is not None and leaf.grad is not None}
    return {
        "losses": torch.stack(list(losses)).detach(),
        "gradients": gradients,
        "calls": dict(traffic.calls),
        "bytes": traffic.total_bytes,
    }


def _run(name: str, own: slice, group: dist.ProcessGroup | None, clock: Any = None) -> dict[str, Any]:
    kind, scales, arguments = RUNS[name]
    arguments = arguments if clock is None else arguments | {"clock": clock}
    loss = (CosmosLoss if kind == "cosmos" else ClipLoss)(group, **arguments)
    student, teacher = _inputs(own, scales, kind == "clip")
    sent = loss.ahead(teacher if kind == "cosmos" else None)
    return _outcome(student, loss(student, sent), loss.traffic)


def _original(own: slice, group: dist.ProcessGroup) -> dict[str, Any]:
    """What the original does: for each of 80 pairs of views it gathers both, puts its own features, the only ones with
    a gradient, in their place, and computes all logits on every rank. Gradients are averaged over ranks."""
    collectives = Collectives(group)
    student, teacher = _inputs(own, SCALES, clip=False)

    def whole(features_BD: Tensor) -> Tensor:
        gathered = list(collectives.all_gather(features_BD.detach()).wait())
        gathered[collectives.rank] = features_BD
        return torch.cat(gathered)

    def mean_loss(rows: list[Tensor], columns: list[Tensor], scale: Tensor) -> Tensor:
        labels = torch.arange(GLOBAL_BATCH)
        losses = []
        for row_BD in rows:
            for column_BD in columns:
                logits_GG = scale * whole(row_BD) @ whole(column_BD).T
                losses.append((F.cross_entropy(logits_GG, labels) + F.cross_entropy(logits_GG.T, labels)) / 2)
        return torch.stack(losses).mean()

    clip = mean_loss(list(student.text), list(student.image[:2]), student.logit_scale)
    rows = [*student.image_crossmodal, *student.text_crossmodal]  # type: ignore[misc]
    distill = mean_loss(rows, [*teacher.image, *teacher.text], student.distill_logit_scale)  # type: ignore[arg-type]
    outcome = _outcome(student, CosmosLossOutput(clip, distill, clip + distill), collectives.traffic)
    for name, grad in outcome["gradients"].items():
        if name in SCALES:
            dist.all_reduce(grad, group=group)
        grad /= collectives.world_size
    return outcome


@dataclass
class Diary:
    """A clock that notes what is begun, waited for and computed, and in which phase."""

    open: list[str] = field(default_factory=lambda: ["none"])
    events: list[str] = field(default_factory=list)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.open.append(phase)
        yield
        self.open.pop()

    def note(self, event: str) -> None:
        self.events.append(f"{event}, {self.open[-1]}")

    def watched(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            self.note(name)
            return Watched(function(*arguments, **named), name, self)

        return run


@dataclass
class Watched:
    """What a collective that goes on returns."""

    work: Any
    name: str
    diary: Diary

    def wait(self) -> None:
        self.diary.note(f"wait for {self.name}")
        self.work.wait()


def _diary(own: slice, group: dist.ProcessGroup) -> list[str]:
    """The order of things in one step; the student's forward is a note."""
    diary = Diary()
    with pytest.MonkeyPatch.context() as patch:
        for name in (ALL_GATHER, "all_to_all_single", REDUCE_SCATTER):
            patch.setattr(dist, name, diary.watched(getattr(dist, name), name))
        for name in ("log_sum_exps", "feature_gradients"):
            stage = getattr(infonce_tiled, name)

            def noted(rows: Tensor, *others: Any, stage: Any = stage, name: str = name) -> Any:
                diary.note(f"{name} of {rows.shape[0]} views")
                return stage(rows, *others)

            patch.setattr(infonce_tiled, name, noted)
        loss = CosmosLoss(group, "tiled", diary)
        student, teacher = _inputs(own, SCALES, clip=False)
        sent = loss.ahead(teacher)
        diary.note("the student")
        total = loss(student, sent).total
        diary.note("backward")
        total.backward()
    return diary.events


def _in_half(name: str, own: slice, group: dist.ProcessGroup) -> dict[str, Any]:
    """As under autocast on a GPU: the products, and what is gathered, in fp16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "_operand_dtype", lambda device: torch.float16)
        return _run(name, own, group)


def _run_rank(folder: str) -> None:
    with joined_ranks("cpu", timeout_s=300.0) as ranks:
        assert ranks.group is not None
        share = GLOBAL_BATCH // ranks.world_size
        own = slice(ranks.rank * share, (ranks.rank + 1) * share)
        found: dict[str, Any] = {name: _run(name, own, ranks.group) for name in RUNS}
        found["half"] = _in_half("cosmos", own, ranks.group)
        found["theirs"] = _original(own, ranks.group)
        found["diary"] = _diary(own, ranks.group)
        torch.save(found, f"{folder}/{ranks.rank}.pt")


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank found."""
    folder = tmp_path_factory.mktemp(f"loss_{request.param}")
    run_ranks(_run_rank, request.param, str(folder))
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
    expected = _run(run, slice(None), None)
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
    exact = _run("cosmos", slice(None), None)
    monkeypatch.setattr(objective, "_operand_dtype", lambda device: torch.float16)
    whole = _run("cosmos", slice(None), None)
    found = added_up(ranks, "half")
    for name, grad in whole["gradients"].items():
        assert off(grad, exact["gradients"][name]) > 1e-5, name  # it does round
        assert off(found[name], grad) < 1e-5, name


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
