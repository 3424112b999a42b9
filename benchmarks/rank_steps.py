"""What the ranks of `bench ranks` do: steps of the trainer under ZeRO, and the rates of a machine that all ranks use.

Every function here is called by all ranks of a launch together; what it returns is this rank's.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.rank_traffic import CountedCollectives
from cosmos_fast.config import TrainConfig, load_config
from cosmos_fast.data.batch import Batch
from cosmos_fast.data.random_batch import RandomLoader, random_batch
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.recipes import get_recipe
from cosmos_fast.utils.collectives import ALL_GATHER
from cosmos_fast.utils.memory import MIB, peak_bytes, reset_peak
from cosmos_fast.utils.ranks import Ranks, joined_ranks

CPU = torch.device("cpu")
WARMUP = 2  # steps; stage 3 knows its way through the model after the first
# Its embeddings, blocks and poolers have the shares of the weights that those of ViT-B/16 have; sequences are short, so
# that what is sent weighs more than on a GPU.
MODEL = (
    *("model.embed_dim=256", "model.pool_heads=4", "data.views.local_image_size=16"),
    "model.vision={image_size: 32, patch_size: 8, width: 256, layers: 6, head_width: 64}",
    "model.text={context_length: 16, vocab_size: 8192, width: 256, heads: 4, layers: 6}",
)
RUN = ("run.precision=fp32", "run.device=cpu", "run.threads=1", "run.max_steps=1000", "schedule.warmup_steps=10")


@dataclass(frozen=True)
class Case:
    """stage: of ZeRO; None is one process without DeepSpeed. copy: run.teacher_copy."""

    stage: int | None
    copy: str = "whole"

    @property
    def name(self) -> str:
        """In metrics."""
        if self.stage is None:
            return "plain"
        return f"stage {self.stage}" + (f", teacher {self.copy}" if self.stage else "")

    def config(self, batch: int, folder: str = "", *more: str) -> TrainConfig:
        """Of a rank that takes `batch` samples a step."""
        own = [f"name=bench_{self.stage}_{self.copy}", f"run.batch_size={batch}", f"run.out_dir={folder or 'runs'}"]
        own += ["evaluate.data=null", "run.checkpoint_every_steps=0"]
        if self.stage is not None:
            own += [f"deepspeed.zero_optimization.stage={self.stage}", f"run.teacher_copy={self.copy}"]
        return load_config(get_recipe("demo"), (*MODEL, *RUN, *own, *more))


class Stepping:
    """A trainer that takes steps on made-up batches, equal ones for equal numbers."""

    def __init__(self, case: Case, batch: int, ranks: Ranks, folder: str, more: tuple[str, ...]) -> None:
        self.config, self._ranks = case.config(batch, folder, *more), ranks
        self._trainer = Trainer(self.config, RandomLoader(self.config), ranks=ranks)

    def batch(self, number: int) -> Batch:
        """This rank's."""
        position, count = self._trainer.state.position, self.config.run.batch_size * self._ranks.world_size
        made = random_batch(self.config, number * self._ranks.world_size + self._ranks.rank)
        return replace(made, position=position, next_position=position + count)

    def step(self, batch: Batch) -> float:
        """Milliseconds from when all ranks are there to when this one is through."""
        self._ranks.barrier()
        start = time.perf_counter()
        outcome = self._trainer.train_step([batch])
        elapsed_ms = 1e3 * (time.perf_counter() - start)
        assert outcome.applied
        self.loss = float(outcome.loss)
        return elapsed_ms


def cost(case: Case, batch: int, more: tuple[str, ...] = ()) -> dict[str, float]:
    """Peak memory over what the process held before, and what one step after a few others sends."""
    with joined_ranks("cpu", always=True) as ranks, tempfile.TemporaryDirectory() as folder:
        if case.stage is not None:
            from cosmos_fast.engine.deepspeed_engine import import_deepspeed

            import_deepspeed(CPU)
        base = reset_peak(CPU)
        stepping = Stepping(case, batch, ranks, folder, more)
        for number in range(WARMUP):
            stepping.step(stepping.batch(number))
        prepared = stepping.batch(WARMUP)
        with CountedCollectives(ranks.rank, ranks.world_size) as counted:
            stepping._trainer.train_step([prepared])
        peak_mib = (peak_bytes(CPU) - base) / MIB
    return {"peak_mib": peak_mib, "received_mib": counted.received_bytes / MIB, "collectives": counted.calls}


def times(cases: list[Case], batch: int, repeats: int, more: tuple[str, ...] = ()) -> dict[str, list[float]]:
    """Milliseconds of every step of each case, in turn on the same batches. Their losses must be equal, bit for bit."""
    with joined_ranks("cpu", always=True) as ranks, tempfile.TemporaryDirectory() as folder:
        sides = [Stepping(case, batch, ranks, folder, more) for case in cases]
        found: dict[str, list[float]] = {case.name: [] for case in cases}
        for number in range(WARMUP + repeats):
            turn = list(zip(cases, sides, strict=True))
            for case, side in turn if number % 2 == 0 else reversed(turn):
                elapsed_ms = side.step(side.batch(number))
                if number >= WARMUP:
                    found[case.name].append(elapsed_ms)
            losses = {side.loss for side in sides}
            assert len(losses) == 1, f"step {number}: {losses}"
    return found


def rates(values: int, seconds: float) -> dict[str, float]:
    """What a rank reaches while all others do the same: means, not the best. values: of a large collective.

    Keys are those of `cosmos-fast plan --assume`.
    """
    with joined_ranks("cpu", always=True) as ranks:
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(768, 768, generator=generator) for _ in range(2))
        product_s = _mean_s(lambda: torch.mm(left, right), ranks, seconds)
        source = torch.randn(values, generator=generator)
        target = torch.empty_like(source)
        copy_s = _mean_s(lambda: target.copy_(source), ranks, seconds)
        found = {"peak_tflops": 2 * 768**3 / product_s / 1e12, "hbm_gb_s": 2 * source.nbytes / copy_s / 1e9}
        if ranks.group is not None:
            found |= _link_rates(source, ranks, seconds)
    return found


def _link_rates(full: torch.Tensor, ranks: Ranks, seconds: float) -> dict[str, float]:
    world, small = ranks.world_size, torch.zeros(1)
    full = full[: len(full) // world * world]
    own = full.chunk(world)[ranks.rank].clone()

    def both() -> None:
        dist.all_reduce(full, group=ranks.group)
        getattr(dist, ALL_GATHER)(full, own, group=ranks.group)

    received = 3 * full.nbytes * (world - 1) / world  # twice in an all-reduce
    rate_gb_s = received / _mean_s(both, ranks, seconds) / 1e9
    latency_s = _mean_s(lambda: dist.all_reduce(small, group=ranks.group), ranks, seconds / 4)
    return {"link_gb_s": rate_gb_s, "latency_us": 1e6 * latency_s / max(1, world.bit_length() - 1)}


def _mean_s(work: Any, ranks: Ranks, seconds: float) -> float:
    """Of one call. All ranks make as many: rank 0 says how many fit."""
    work()
    ranks.barrier()
    start = time.perf_counter()
    work()
    each_s = time.perf_counter() - start
    count = ranks.on_first(lambda: max(2, min(1000, int(seconds / max(each_s, 1e-6)))))
    ranks.barrier()
    start = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - start) / count
