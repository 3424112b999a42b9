"""All negatives of a step over real ranks: micro-batches of every rank together are one batch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cosmos_fast.loss import ClipLoss, CosmosLoss
from tests.tiny_run import make_batch, make_trainer, tiny_config

WORLD = 2
POSITIONS = [[0, 2, 4], [6, 8, 10]]  # of the micro-batches of each rank
RECIPES = ("demo", "demo_clip")


def _run(folder: str, recipe: str, positions: list[int], group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """Losses and gradients of one step over the micro-batches at these positions; equal weights everywhere."""
    config = tiny_config(Path(folder), "run.batch_size=2", "run.negatives=all", recipe=recipe)
    found = make_trainer(config).gradients
    found.objective = CosmosLoss(group) if recipe == "demo" else ClipLoss(group)
    losses = found.accumulate([make_batch(config, position) for position in positions])
    grads = {name: p.grad for name, p in found.student.named_parameters() if p.grad is not None}
    return {"losses": losses, **grads}


def _run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    for recipe in RECIPES:
        torch.save(_run(folder, recipe, POSITIONS[rank], dist.group.WORLD), f"{folder}/{recipe}_{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_and_micro_batches_add_up_to_one_batch(tmp_path: Path) -> None:
    mp.spawn(_run_rank, (str(tmp_path),), nprocs=WORLD)
    for recipe in RECIPES:
        ranks = [torch.load(tmp_path / f"{recipe}_{rank}.pt") for rank in range(WORLD)]
        whole = _run(str(tmp_path), recipe, [position for own in POSITIONS for position in own], None)
        for found in ranks:
            torch.testing.assert_close(found["losses"], whole["losses"], rtol=1e-5, atol=1e-6)
        for name in set(whole) - {"losses"}:
            total = torch.stack([found[name] for found in ranks]).sum(dim=0)
            assert float((total - whole[name]).norm() / whole[name].norm()) < 1e-5, (recipe, name)
