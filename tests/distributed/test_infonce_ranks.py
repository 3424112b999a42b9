"""The operation over real ranks: one gather, and together exactly the gradient of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cosmos_fast.ops import multiview_infonce
from cosmos_fast.utils.ranks import joined_ranks
from cosmos_kernels import reference
from tests.ranks import run_ranks

WORLD, BATCH, DIM, SCALE = 3, 6, 8, 14.3
VIEWS = [(2, 5), (5, 2), (1, 1)]


def _features(views: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(views, BATCH, DIM, generator=generator, dtype=torch.float64), dim=-1)


def _run_rank(folder: str) -> None:
    with joined_ranks("cpu", timeout_s=300.0) as ranks:
        share = BATCH // WORLD
        own = slice(ranks.rank * share, (ranks.rank + 1) * share)
        found = []
        for views in VIEWS:
            a, b = (_features(count, seed)[:, own].clone().requires_grad_() for seed, count in enumerate(views))
            scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
            loss = multiview_infonce(a, b, scale, group=ranks.group)
            loss.backward()
            found.append({"loss": loss.detach(), "a": a.grad, "b": b.grad, "scale": scale.grad})
        with pytest.raises(ValueError, match="the eager backend computes one process's batch"):
            multiview_infonce(a, b, scale, group=ranks.group, backend="eager")
        torch.save(found, f"{folder}/{ranks.rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """Of every rank, what it computed for each pair of VIEWS."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    run_ranks(_run_rank, WORLD, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(VIEWS)), ids=str)
def test_ranks_add_up_to_the_whole_batch(case: int, found: list[list[dict[str, Any]]]) -> None:
    ranks = [rank[case] for rank in found]
    a, b = (_features(count, seed).requires_grad_() for seed, count in enumerate(VIEWS[case]))
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    loss = reference.multiview_infonce(a, b, scale)
    loss.backward()
    for rank in ranks:
        torch.testing.assert_close(rank["loss"], loss.detach())
    torch.testing.assert_close(torch.cat([rank["a"] for rank in ranks], dim=1), a.grad)
    torch.testing.assert_close(torch.cat([rank["b"] for rank in ranks], dim=1), b.grad)
    torch.testing.assert_close(sum(rank["scale"] for rank in ranks), scale.grad)
