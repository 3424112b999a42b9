"""Trainings that every rank of one launch runs one after the other; rank 0 keeps what came out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cosmos_fast.config import TrainConfig
from cosmos_fast.data.batch import Batch
from cosmos_fast.data.random_batch import random_batch
from cosmos_fast.engine.checkpoint import list_checkpoints, load
from cosmos_fast.engine.metrics import read_rows
from cosmos_fast.engine.run_folder import plan_run
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.utils.ranks import Ranks, joined_ranks
from tests.tiny_run import FakeLoader, tiny_config

GLOBAL_BATCH, STEPS = 8, 20
BAD_STEP = 2


@dataclass(frozen=True)
class Case:
    """poisoned: the rank whose samples are bad in step BAD_STEP. resumed_at: the step after which a signal to one rank
    stops the run, and a new trainer goes on from its checkpoint."""

    overrides: tuple[str, ...] = ()
    poisoned: int | None = None
    resumed_at: int | None = None
    steps: int = STEPS


CLIPPED = "optimizer.clip_norm=0.5"
MICRO = ("run.accumulate_steps=2", CLIPPED)
LONG = (CLIPPED, "run.evaluate_every_steps=8")
PARTS = "run.teacher_copy=parts"
OFFLOADED = "deepspeed.zero_optimization.offload_optimizer.device=cpu"
CASES = {
    **{f"stage{stage}": Case((f"deepspeed.zero_optimization.stage={stage}", *LONG)) for stage in range(4)},
    **{
        f"parts_stage{stage}": Case((f"deepspeed.zero_optimization.stage={stage}", *LONG, PARTS)) for stage in (1, 2, 3)
    },
    "parts_micro_stage3": Case(("deepspeed.zero_optimization.stage=3", *MICRO, PARTS), steps=3),
    **{
        f"all_stage{stage}": Case((f"deepspeed.zero_optimization.stage={stage}", *MICRO, "run.negatives=all"), steps=3)
        for stage in (0, 2, 3)
    },
    **{
        f"all_offloaded_stage{stage}": Case(
            (f"deepspeed.zero_optimization.stage={stage}", OFFLOADED, *MICRO, "run.negatives=all"), steps=3
        )
        for stage in (1, 2, 3)
    },
    "micro_stage2": Case(("deepspeed.zero_optimization.stage=2", *MICRO), steps=3),
    **{
        f"bad_stage{stage}": Case((f"deepspeed.zero_optimization.stage={stage}",), poisoned=1, steps=4)
        for stage in (0, 1, 3)
    },
    **{
        f"resumed_stage{stage}": Case((f"deepspeed.zero_optimization.stage={stage}",), resumed_at=3, steps=6)
        for stage in (1, 3)
    },
    "bf16": Case(("deepspeed.zero_optimization.stage=1", "run.precision=bf16"), steps=3),
    "offloaded": Case(("deepspeed.zero_optimization.stage=2", OFFLOADED), steps=3),
    "offloaded_stage3": Case(("deepspeed.zero_optimization.stage=3", OFFLOADED, PARTS), steps=3),
    **{
        f"remade_{what}_stage{stage}": Case(
            (f"deepspeed.zero_optimization.stage={stage}", f"compute.checkpoint_activations={what}"), steps=3
        )
        for what, stage in (("mlp", 2), ("blocks", 3))
    },
    "fp16": Case(("deepspeed.zero_optimization.stage=2", "run.precision=fp16"), steps=3),
    "clip_stage3": Case(("deepspeed.zero_optimization.stage=3",), steps=3),
}


def config_of(name: str, folder: Path, world_size: int, *more: str) -> TrainConfig:
    """The case's configuration for one rank of so many, of the same global batch."""
    case = CASES[name]
    micro = 2 if "run.accumulate_steps=2" in case.overrides else 1
    settings = (f"name={name}", f"run.batch_size={GLOBAL_BATCH // world_size // micro}", f"run.max_steps={case.steps}")
    settings += ("run.teacher_copy=whole",)
    return tiny_config(folder, *settings, *case.overrides, *more, recipe="demo_clip" if "clip" in name else "demo")


class RankLoader(FakeLoader):
    """This rank's part of batches that are the same for any number of ranks."""

    def __init__(self, config: TrainConfig, ranks: Ranks, start: int, poisoned: int | None) -> None:
        super().__init__(config, start)
        self.ranks, self.poisoned = ranks, poisoned
        self.micro = config.run.batch_size
        wide = config.run.batch_size * ranks.world_size
        self.wide = replace(config, run=replace(config.run, batch_size=wide))

    def __iter__(self) -> Iterator[Batch]:
        position, count = self.position, self.wide.run.batch_size
        while True:
            whole = random_batch(self.wide, position)
            own = slice(self.ranks.rank * self.micro, (self.ranks.rank + 1) * self.micro)
            images = [view[own].clone() for view in whole.images]
            bad_here = self.poisoned is not None and self.ranks.rank == self.poisoned % self.ranks.world_size
            if bad_here and position // GLOBAL_BATCH == BAD_STEP:
                images[0][1] = float("nan")
            position += count
            yield replace(whole, images=images, texts=whole.texts[:, own], keys=whole.keys[own], next_position=position)


def norms(step: int, student: torch.nn.Module, teacher: torch.nn.Module) -> dict[str, float]:
    """A validator: how large the whole models are."""
    models = {"student_norm": student, "teacher_norm": teacher}
    return {name: float(torch.cat([p.flatten() for p in model.parameters()]).norm()) for name, model in models.items()}


def run_case(name: str, folder: Path, ranks: Ranks, *more: str) -> dict[str, object]:
    """Train; student, teacher and optimizer whole, and the rows of the metrics."""
    case = CASES[name]
    if case.resumed_at is not None and not more:
        # The same schedule, cut short: the run stops as a signal would stop it.
        config = config_of(name, folder, ranks.world_size)
        first = Trainer(config, RankLoader(config, ranks, 0, None), ranks=ranks)
        step = first.train_step

        def stopping(*arguments: object) -> object:
            outcome = step(*arguments)  # type: ignore[arg-type]
            if first.state.step == case.resumed_at and ranks.rank == ranks.world_size - 1:
                first.stop.signal_name = "SIGTERM"  # on one rank only
            return outcome

        first.train_step = stopping  # type: ignore[assignment, method-assign]
        first.fit()
        assert first.state.step == case.resumed_at, first.state
    config = config_of(name, folder, ranks.world_size, *more)
    plan = plan_run(config, "auto" if case.resumed_at is not None and not more else None)
    loader, validators = RankLoader(config, ranks, plan.state.position, case.poisoned), (norms,) if ranks.first else ()
    trainer = Trainer(config, loader, validators, plan=plan, ranks=ranks)
    trainer.fit()
    kept = load(list_checkpoints(plan.checkpoints)[-1])
    rows = read_rows(plan.metrics_file)
    with trainer.whole_models():
        whole_teacher = {name: tensor.clone() for name, tensor in trainer.teacher.state_dict().items()}
    return {
        "student": kept.student,
        "teacher": kept.teacher,
        "optimizer": kept.optimizer,
        "rows": rows,
        "whole_teacher": whole_teacher,
        "teacher_values": sum(p.numel() for p in trainer.teacher.parameters()),
        "state": trainer.state.to_json(),
    }


def run_cases(folder: str, names: Sequence[str] = tuple(CASES)) -> None:
    """The cases on this rank; what comes out goes to <folder>/<case>.pt."""
    with joined_ranks("cpu", always=True) as ranks:
        for name in names:
            found = run_case(name, Path(folder), ranks)
            if ranks.first:
                torch.save(found, f"{folder}/{name}.pt")
