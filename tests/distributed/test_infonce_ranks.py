"""The loss over real ranks: one gather, and together exactly the gradient of one process with the whole batch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from cosmos_fast.ops import multiview_infonce
from cosmos_kernels import reference

BATCH, DIM, SCALE = 6, 8, 14.3


def _features(views: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(views, BATCH, DIM, generator=generator, dtype=torch.float64), dim=-1)


def _run_rank(rank: int, world: int, folder: str, views: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    share = BATCH // world
    own = slice(rank * share, (rank + 1) * share)
    a, b = (_features(count, seed)[:, own].clone().requires_grad_() for seed, count in enumerate(views))
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    loss = multiview_infonce(a, b, scale, group=dist.group.WORLD)
    loss.backward()
    torch.save({"loss": loss.detach(), "a": a.grad, "b": b.grad, "scale": scale.grad}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("world", "views"), [(2, (2, 5)), (2, (5, 2)), (3, (1, 1))])
def test_ranks_add_up_to_the_whole_batch(tmp_path: Path, world: int, views: tuple[int, int]) -> None:
    mp.spawn(_run_rank, (world, str(tmp_path), views), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    a, b = (_features(count, seed).requires_grad_() for seed, count in enumerate(views))
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    loss = reference.multiview_infonce(a, b, scale)
    loss.backward()
    for rank in ranks:
        torch.testing.assert_close(rank["loss"], loss.detach())
    torch.testing.assert_close(torch.cat([rank["a"] for rank in ranks], dim=1), a.grad)
    torch.testing.assert_close(torch.cat([rank["b"] for rank in ranks], dim=1), b.grad)
    torch.testing.assert_close(sum(rank["scale"] for rank in ranks), scale.grad)
