"""Published sets during training: what the trainer calls every run.evaluate_every_steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from cosmos_fast.config.train import TrainConfig
from cosmos_fast.evaluate.datasets.registry import open_sets, require_same
from cosmos_fast.evaluate.datasets.sets import task_of
from cosmos_fast.evaluate.division import ALONE, Division
from cosmos_fast.evaluate.encoder import in_precision
from cosmos_fast.evaluate.published import evaluate_set
from cosmos_fast.evaluate.set_runs import Settings
from cosmos_fast.evaluate.tables import HEADLINES
from cosmos_fast.utils.bf16 import bf16_if_fast


class BenchmarkValidator:
    """Callable (step, student, teacher) -> `student_coco_i2t_r1`, ..., `teacher_imagenet_top1`, `chance_coco_...`.

    Every rank calls it, and gets the numbers of one process, those of `eval run` with the same batch size and
    precision; `precision` says which. The sets of evaluate.benchmarks are opened, called by every rank, when it is
    made: UserError. Images are read at every call.
    """

    def __init__(self, config: TrainConfig, division: Division = ALONE) -> None:
        asked = config.evaluate
        self.division, self.settings = division, Settings(batch_size=asked.batch_size, precision=asked.precision)
        folders = {name: Path(path).expanduser() for name, path in asked.benchmarks.items()}
        with division.together():
            self.sets = open_sets(folders, asked.max_samples)
        require_same(self.sets, folders, division.ranks)

    def __call__(self, step: int, student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
        precision = bf16_if_fast(self.settings.precision, next(student.parameters()).device)
        settings = replace(self.settings, precision=precision)
        row: dict[str, Any] = {"precision": precision}
        for name, found in self.sets.items():
            for of, model in (("student", student), ("teacher", teacher)):
                measured = in_precision(cast(Any, model), precision)
                result = evaluate_set(measured, found, settings, self.division)
                for key in HEADLINES[task_of(found)]:
                    row[f"{of}_{name}_{key}"] = result.metrics[key]
                    row[f"chance_{name}_{key}"] = result.chance[key]
        return row
