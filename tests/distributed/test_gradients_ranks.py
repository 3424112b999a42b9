"""All negatives of a step over real ranks: micro-batches of every rank together are one batch, step after step."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cosmos_fast.loss import ClipLoss, CosmosLoss
from cosmos_fast.utils.phases import PhaseTimer, no_clock
from tests.tiny_run import flat, make_batch, make_trainer, tiny_config

WORLD = 2
STEPS = 3
POSITIONS = [[0, 2, 4], [6, 8, 10]]  # of the micro-batches of each rank; 12 further in every step
RECIPES = ("demo", "demo_clip")
LATE_S = 0.3
CLIP_NORM = 0.5


def _run(
    folder: str, recipe: str, positions: list[int], group: dist.ProcessGroup | None, clock: Any = no_clock
) -> dict[str, Any]:
    """STEPS steps over the micro-batches at these positions, and the gradients of the first; equal weights everywhere.

    fp16 stands for its loss scale: the arithmetic is fp32, in which ranks and micro-batches can be held to 1e-5.
    """
    settings = ("run.batch_size=2", "run.negatives=all", f"optimizer.clip_norm={CLIP_NORM}")
    trainer = make_trainer(tiny_config(Path(folder), *settings, recipe=recipe))
    gradients = trainer.gradients
    gradients.clock = clock
    gradients.objective = (CosmosLoss if recipe == "demo" else ClipLoss)(group, clock=clock)
    trainer.state.loss_scale = 2.0**12
    first: dict[str, torch.Tensor] = {}
    losses, norms = [], []
    for step in range(STEPS):
        trainer.optimizer.zero_grad()
        losses.append(gradients.accumulate([make_batch(trainer.config, 12 * step + at) for at in positions]))
        named = {name: p.grad for name, p in trainer.student.named_parameters() if p.grad is not None}
        for grad in named.values() if group is not None else ():
            dist.all_reduce(grad, group=group)
        first = first or {name: grad.clone() for name, grad in named.items()}
        result = trainer.optimizer.step(lr=1e-3, ema_decay=0.9, loss=losses[-1][2], loss_scale=trainer.scaler.scale)
        assert result.applied
        norms.append(result.grad_norm)
    weights = {"student": flat(trainer.student), "teacher": flat(trainer.teacher)}
    return {"losses": torch.stack(losses), "norms": torch.tensor(norms), "gradients": first, **weights}


class CountingClock:
    """A phase timer that remembers inside which phase every collective was."""

    def __init__(self) -> None:
        self.timer = PhaseTimer(torch.device("cpu"))
        self.open: list[str] = []
        self.collectives: list[str] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if phase == "communication":
            self.collectives.append(self.open[-1])
        self.open.append(phase)
        with self.timer(phase):
            yield
        self.open.pop()


def _ledger(folder: str, group: dist.ProcessGroup, rank: int) -> dict[str, Any]:
    """One step of which the last rank comes late to the loss, by the phase clock."""
    clock = CountingClock()
    config = tiny_config(Path(folder), "run.batch_size=2")
    trainer = make_trainer(config)
    trainer.gradients.clock = clock
    trainer.gradients.objective = CosmosLoss(group, clock=clock)
    dist.barrier()
    clock.timer.start()
    if rank == WORLD - 1:
        with clock("data"):
            time.sleep(LATE_S)
    trainer.gradients.accumulate([make_batch(config, 2 * rank)])
    ledger = clock.timer.stop(steps=1)
    return {"collectives": clock.collectives, "phase_ms": ledger.phase_ms, "wall_ms": ledger.wall_ms}


def _run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    group = dist.group.WORLD
    assert group is not None
    for recipe in RECIPES:
        torch.save(_run(folder, recipe, POSITIONS[rank], group), f"{folder}/{recipe}_{rank}.pt")
    torch.save(_ledger(folder, group, rank), f"{folder}/ledger_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what two ranks computed."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_run_rank, (str(folder),), nprocs=WORLD)
    return folder


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_ranks_and_micro_batches_add_up_to_one_batch(recipe: str, found: Path, tmp_path: Path) -> None:
    ranks = [torch.load(found / f"{recipe}_{rank}.pt") for rank in range(WORLD)]
    positions = [position for own in POSITIONS for position in own]
    whole = _run(str(tmp_path), recipe, positions, None)
    start = make_trainer(tiny_config(tmp_path, recipe=recipe))
    assert float(whole["norms"].min()) > CLIP_NORM
    for rank in ranks:
        for name, grad in whole["gradients"].items():
            assert off(rank["gradients"][name], grad) < 1e-5, name
        torch.testing.assert_close(rank["losses"], whole["losses"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rank["norms"], whole["norms"], rtol=1e-5, atol=0.0)
        for name in ("student", "teacher"):  # how far three steps have moved them
            origin = flat(getattr(start, name))
            assert off(rank[name] - origin, whole[name] - origin) < 1e-3, name
    assert torch.equal(ranks[0]["student"], ranks[1]["student"])
    assert torch.equal(ranks[0]["teacher"], ranks[1]["teacher"])


@pytest.mark.slow
def test_collectives_and_the_wait_for_the_slowest_rank_are_communication(found: Path) -> None:
    early, late = (torch.load(found / f"ledger_{rank}.pt") for rank in range(WORLD))
    for rank in (early, late):
        # Two terms: a gather of the columns and two reductions each; the student's columns get their gradient back.
        assert rank["collectives"] == ["loss"] * 6 + ["backward"]
        phase_ms = rank["phase_ms"]
        assert min(phase_ms.values()) >= 0
        assert phase_ms["communication"] > 0
        assert sum(phase_ms.values()) == pytest.approx(rank["wall_ms"])
    assert late["phase_ms"]["data"] >= 1e3 * LATE_S
    assert early["phase_ms"]["communication"] > 0.5 * 1e3 * LATE_S
    assert early["phase_ms"]["loss"] < 0.5 * 1e3 * LATE_S
