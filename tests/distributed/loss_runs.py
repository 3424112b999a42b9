"""What test_loss_ranks has its ranks do.

Axes: V views, B per-rank batch, G global batch, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
POISONED = (*FEATURES, "teacher image", "teacher text")


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


def run_loss(name: str, own: slice, group: dist.ProcessGroup | None, clock: Any = None) -> dict[str, Any]:
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
        return run_loss(name, own, group)


def _poisoned(name: str, rank: int, own: slice, group: dist.ProcessGroup) -> list[bool]:
    """Whether loss and gradients are NaN where one feature of rank 0 is."""
    student, teacher = _inputs(own, SCALES, clip=False)
    if rank == 0:
        views = (
            getattr(teacher, name.removeprefix("teacher ")) if name.startswith("teacher") else getattr(student, name)
        )
        views.data[0, 0, 3] = math.nan
    loss = CosmosLoss(group)
    total = loss(student, loss.ahead(teacher)).total
    total.backward()
    assert student.text_crossmodal is not None
    assert student.text_crossmodal.grad is not None
    return [bool(total.isnan()), bool(student.text_crossmodal.grad.isnan().any())]


def run_rank(folder: str) -> None:
    with joined_ranks("cpu", timeout_s=300.0) as ranks:
        assert ranks.group is not None
        share = GLOBAL_BATCH // ranks.world_size
        own = slice(ranks.rank * share, (ranks.rank + 1) * share)
        found: dict[str, Any] = {name: run_loss(name, own, ranks.group) for name in RUNS}
        found["half"] = _in_half("cosmos", own, ranks.group)
        found["theirs"] = _original(own, ranks.group)
        found["diary"] = _diary(own, ranks.group)
        found["poisoned"] = {name: _poisoned(name, ranks.rank, own, ranks.group) for name in POISONED}
        torch.save(found, f"{folder}/{ranks.rank}.pt")
