"""Steps over real ranks: the samples of all ranks and micro-batches are one batch, the update that of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cosmos_fast.config import TrainConfig
from cosmos_fast.loss import build_objective
from cosmos_fast.utils.ranks import joined_ranks
from tests.ranks import run_ranks
from tests.tiny_run import flat, make_batch, make_trainer, tiny_config

WORLDS = (2, 4)
STEPS = 3
POSITIONS = [0, 2, 4, 6]  # of a step's micro-batches of two, shared out among the ranks; 8 further in every step
RECIPES = ("demo", "demo_clip")
CLIP_NORM = 0.5


def _config(folder: str, recipe: str, *settings: str) -> TrainConfig:
    common = ("run.batch_size=2", "run.negatives=all", f"optimizer.clip_norm={CLIP_NORM}")
    return tiny_config(Path(folder), *common, *settings, recipe=recipe)


def _run(config: TrainConfig, positions: list[int], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """STEPS steps over the micro-batches at these positions, and the gradients of the first; equal weights everywhere.

    fp16 stands for its loss scale: the arithmetic is fp32, in which ranks and micro-batches can be held to 1e-5.
    """
    trainer = make_trainer(config)
    trainer.gradients.objective = build_objective(config, group)
    trainer.state.loss_scale = 2.0**12
    first: dict[str, torch.Tensor] = {}
    losses, norms = [], []
    for step in range(STEPS):
        trainer.optimizer.zero_grad()
        losses.append(trainer.gradients.accumulate([make_batch(config, 8 * step + at) for at in positions]))
        named = {name: p.grad for name, p in trainer.student.named_parameters() if p.grad is not None}
        for grad in named.values() if group is not None else ():
            dist.all_reduce(grad, group=group)
        first = first or {name: grad.clone() for name, grad in named.items()}
        result = trainer.optimizer.step(lr=1e-3, ema_decay=0.9, loss=losses[-1][2], loss_scale=trainer.scaler.scale)
        assert result.applied
        norms.append(result.grad_norm)
    weights = {"student": flat(trainer.student), "teacher": flat(trainer.teacher)}
    return {"losses": torch.stack(losses), "norms": torch.tensor(norms), "gradients": first, **weights}


def _run_rank(folder: str) -> None:
    with joined_ranks("cpu", timeout_s=300.0) as ranks:
        share = len(POSITIONS) // ranks.world_size
        own = POSITIONS[ranks.rank * share :][:share]
        for recipe in RECIPES:
            torch.save(_run(_config(folder, recipe), own, ranks.group), f"{folder}/{recipe}_{ranks.rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], list[dict[str, Any]]]:
    """What every rank of a world computed for a recipe."""
    folders: dict[int, Path] = {}

    def get(world: int, recipe: str) -> list[dict[str, Any]]:
        if world not in folders:
            folders[world] = tmp_path_factory.mktemp(f"ranks_{world}")
            run_ranks(_run_rank, world, str(folders[world]))
        return [torch.load(folders[world] / f"{recipe}_{rank}.pt") for rank in range(world)]

    return get


@pytest.fixture(scope="module", params=RECIPES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """A recipe, and what one process with all samples computes; its starting weights too."""
    folder = str(tmp_path_factory.mktemp("whole"))
    config = _config(folder, request.param)
    start = make_trainer(config)
    origins = {f"first {name}": flat(getattr(start, name)).clone() for name in ("student", "teacher")}
    return request.param, _run(config, POSITIONS, None) | origins


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_ranks_and_micro_batches_add_up_to_one_batch(
    world: int,
    whole: tuple[str, dict[str, Any]],
    found: Callable[[int, str], list[dict[str, Any]]],
) -> None:
    """Two ranks accumulate two micro-batches each (features joined, then run again); four have one each."""
    recipe, expected = whole
    ranks = found(world, recipe)
    assert float(expected["norms"].min()) > CLIP_NORM
    for rank in ranks:
        assert rank["gradients"].keys() == expected["gradients"].keys()
        for name, grad in expected["gradients"].items():
            assert off(rank["gradients"][name], grad) < 1e-5, name
        torch.testing.assert_close(rank["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
        # Adam makes steps of the rounding of gradients that are zero, such as those of the keys' biases.
        exact = STEPS if world == 2 else 2
        torch.testing.assert_close(rank["norms"][:exact], expected["norms"][:exact], rtol=1e-5, atol=0.0)
        torch.testing.assert_close(rank["norms"], expected["norms"], rtol=1e-4, atol=0.0)
        for name in ("student", "teacher"):  # how far three steps have moved them
            origin = expected[f"first {name}"]
            assert off(rank[name] - origin, expected[name] - origin) < 1e-3, name
        assert torch.equal(rank["student"], ranks[0]["student"])
        assert torch.equal(rank["teacher"], ranks[0]["teacher"])
