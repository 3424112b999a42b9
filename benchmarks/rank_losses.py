"""The losses over ranks against the original's gathers: gradients, collectives, bytes, time.

The original forms its 80 pairs of views one by one, and for each gathers both sides: 160 gathers a step. Of what has
come, each rank puts its own features, the only ones with a gradient, in their place.

Axes: V views, B per-rank batch, G global batch, D embedding.
"""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.eager_cosmos import EagerFeatures
from benchmarks.eager_cosmos.loss import cosmos_loss, infonce
from benchmarks.harness import assert_agree
from benchmarks.shapes import GLOBAL_VIEWS, LOCAL_VIEWS
from cosmos_fast.loss import CosmosLoss, objective
from cosmos_fast.model import CosmosFeatures, TeacherFeatures
from cosmos_fast.utils.collectives import Collectives
from cosmos_fast.utils.ranks import Ranks, joined_ranks

DIM = 512  # of every published model
STUDENT = ("image", "text", "image_crossmodal", "text_crossmodal")
SCALES = {"logit_scale": 14.3, "distill_logit_scale": 20.0}
WARMUP = 2


def measure(batch: int, repeats: int) -> dict[str, Any]:
    """Calls, bytes received and milliseconds of both sides on this rank; their gradients are held to each other."""
    with joined_ranks("cpu") as ranks:
        original, ours = _original(0, batch, ranks), _ours(0, batch, ranks, "original")
        assert_agree(ours["gradients"], original["gradients"], rtol=1e-4, atol=1e-7)
        exact = _ours(0, batch, ranks)
        with mock.patch.object(objective, "_operand_dtype", return_value=torch.bfloat16):
            half = _ours(0, batch, ranks)
        found = {
            "original_calls": original["traffic"].total_calls,
            "original_bytes": original["traffic"].total_bytes,
            "calls": exact["traffic"].total_calls,
            "bytes": exact["traffic"].total_bytes,
            "half_bytes": half["traffic"].total_bytes,
            "original_ms": [],
            "ms": [],
        }
        for number in range(WARMUP + repeats):
            sides = [("original_ms", _original), ("ms", _ours)]
            for name, run in sides if number % 2 == 0 else reversed(sides):
                ranks.barrier()
                start = time.perf_counter()
                run(number, batch, ranks)
                if number >= WARMUP:
                    found[name].append(1e3 * (time.perf_counter() - start))
    return found


def _features(seed: int, batch: int, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """[V, B, D] of this rank: the student's, as leaves with the scales, and the teacher's."""
    generator = torch.Generator().manual_seed(seed * ranks.world_size + ranks.rank)
    views = GLOBAL_VIEWS + LOCAL_VIEWS
    leaves = {name: F.normalize(torch.randn(views, batch, DIM, generator=generator), dim=-1) for name in STUDENT}
    leaves |= {name: torch.tensor(value) for name, value in SCALES.items()}
    teacher = {
        name: F.normalize(torch.randn(GLOBAL_VIEWS, batch, DIM, generator=generator), dim=-1) for name in STUDENT[:2]
    }
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}, teacher


def _ours(seed: int, batch: int, ranks: Ranks, towers: Any = "exact") -> dict[str, Any]:
    """Gradients of the towers, and what was sent."""
    leaves, teacher = _features(seed, batch, ranks)
    loss = CosmosLoss(ranks.group, tower_gradients=towers)
    sent = loss.ahead(TeacherFeatures(**teacher))
    loss(CosmosFeatures(**leaves), sent).total.backward()
    return {"gradients": {name: leaves[name].grad for name in STUDENT}, "traffic": loss.traffic}


def _original(seed: int, batch: int, ranks: Ranks) -> dict[str, Any]:
    """Gradients of the towers, averaged over ranks as DistributedDataParallel averages those of the weights."""
    assert ranks.group is not None
    collectives = Collectives(ranks.group)
    leaves, teacher = _features(seed, batch, ranks)

    def whole(features_BD: Tensor) -> Tensor:
        gathered = list(collectives.all_gather(features_BD.detach()).wait())
        gathered[ranks.rank] = features_BD
        return torch.cat(gathered)

    def pair(a_BD: Tensor, b_BD: Tensor, scale: Tensor) -> Tensor:
        return infonce(whole(a_BD), whole(b_BD), scale)

    flat = {name: x.flatten(0, 1) if x.dim() == 3 else x for name, x in leaves.items()}
    targets = {name: x.flatten(0, 1) for name, x in teacher.items()}
    scales = {name: flat[name] for name in SCALES}
    plain = EagerFeatures(**targets, image_crossmodal=None, text_crossmodal=None, **scales)
    cosmos_loss(EagerFeatures(**flat), plain, batch, pair).total.backward()
    gradients = {name: leaves[name].grad / ranks.world_size for name in STUDENT}  # type: ignore[operator]
    return {"gradients": gradients, "traffic": collectives.traffic}
