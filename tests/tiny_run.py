"""A run small enough for a unit test: a two-block model, and a loader whose batches are a pure function of position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cosmos_fast.config import TrainConfig, load_config
from cosmos_fast.data.batch import Batch
from cosmos_fast.data.random_batch import RandomLoader, random_batch
from cosmos_fast.engine.metrics import read_rows
from cosmos_fast.engine.run_folder import RunPlan, plan_run
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.recipes import get_recipe

TINY = (
    "model.embed_dim=16",
    "model.pool_heads=2",
    "model.vision={image_size: 16, patch_size: 8, width: 16, layers: 2, head_width: 8}",
    "model.text={context_length: 8, vocab_size: 64, width: 16, heads: 2, layers: 2}",
    "data.views.local_image_size=8",
    "data.views.local_crops=2",
    "data.views.local_captions=2",
    "schedule.warmup_steps=2",
    "evaluate.data=null",
    "run.batch_size=4",
    "run.max_steps=6",
    "optimizer.lr=1e-3",
    "run.log_every_steps=1",
    "run.checkpoint_every_steps=0",
    "run.evaluate_every_steps=0",
)


def tiny_config(out_dir: Path, *overrides: str, recipe: str = "demo") -> TrainConfig:
    """The demo recipe shrunk by TINY."""
    return load_config(get_recipe(recipe), (*TINY, f"name={recipe}", f"run.out_dir={out_dir}", *overrides))


class FakeLoader(RandomLoader):
    """Stands in for data.Loader. poison: called with every batch, may change it in place."""

    def __init__(self, config: TrainConfig, start: int = 0, poison: Callable[[Batch], None] | None = None) -> None:
        super().__init__(config, start)
        self.samples_per_epoch = config.data.samples_per_epoch or 40
        self.poison = poison

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if self.poison is not None:
                self.poison(batch)
            yield batch


make_batch = random_batch


def make_trainer(
    config: TrainConfig,
    validators: tuple[Any, ...] = (),
    *,
    plan: RunPlan | None = None,
    poison: Callable[[Batch], None] | None = None,
) -> Trainer:
    """A trainer over a FakeLoader that starts where the plan does."""
    plan = plan or plan_run(config)
    return Trainer(config, FakeLoader(config, plan.state.position, poison), validators, plan=plan)


def add_noise(batch: Batch) -> None:
    """A poison that draws from torch's global generator, so that losses show whether its state was kept."""
    for view in batch.images:
        view.add_(torch.rand_like(view))


def rows_of(trainer: Trainer, kind: str = "train") -> list[dict]:
    """Rows of metrics.jsonl."""
    return [row for row in read_rows(trainer.plan.metrics_file) if row["kind"] == kind]


def losses_of(trainer: Trainer) -> list[float]:
    """Loss of every logged step."""
    return [row["loss"] for row in rows_of(trainer)]


def flat(model: torch.nn.Module) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
