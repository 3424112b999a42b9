"""`cosmos-fast eval run`: the models of a checkpoint on everything that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from cosmos_fast.cli.eval_shown import evaluate_all, pick_device, print_benchmarks, print_table, progress_bar
from cosmos_fast.config import SourceConfig
from cosmos_fast.data.storage import Storage
from cosmos_fast.engine.out_of_memory import is_out_of_memory
from cosmos_fast.engine.precision import resolve_precision
from cosmos_fast.evaluate import record
from cosmos_fast.evaluate.batch_fit import fitting_batch
from cosmos_fast.evaluate.class_files import with_classes
from cosmos_fast.evaluate.datasets.registry import open_sets, require_same
from cosmos_fast.evaluate.datasets.sets import EvalSet
from cosmos_fast.evaluate.division import Division
from cosmos_fast.evaluate.encoder import in_precision
from cosmos_fast.evaluate.protocols import with_protocol
from cosmos_fast.evaluate.published import evaluate_set, texts_of
from cosmos_fast.evaluate.scenes import SceneSet
from cosmos_fast.evaluate.set_runs import Settings
from cosmos_fast.evaluate.tasks import TaskResult
from cosmos_fast.model.checkpoints import WeightsOf, find_weights_file, load_checkpoint, weights_in
from cosmos_fast.model.cosmos import CosmosModel
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.files import sha256_of
from cosmos_fast.utils.ranks import Ranks, device_of_rank

BOTH = ("teacher", "student")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The command's options. weights: one, or BOTH. batch_size: None is found out."""

    checkpoint: Path
    weights: tuple[str, ...]
    benchmarks: Mapping[str, Path]
    data: str | None
    tasks: tuple[str, ...]
    classes: Path | None
    max_samples: int | None
    batch_size: int | None
    precision: str
    device: str
    storage: Storage
    protocol: tuple[str, ...] = ()

    def check(self) -> None:
        """UserError where the options do not go together."""
        if self.data is None and not self.benchmarks:
            raise UserError("nothing to evaluate on: give --benchmark NAME=PATH (`eval sets` lists them), or --data")
        if self.classes is not None and len(self.benchmarks) != 1:
            raise UserError(f"--classes {self.classes} is for one --benchmark, {len(self.benchmarks)} are given")


@dataclass(frozen=True)
class Held:
    """What models are evaluated on, opened. scenes: of --data."""

    sets: dict[str, EvalSet]
    scenes: SceneSet | None


def measure_all(asked: Asked, ranks: Ranks) -> dict[str, Any]:
    """What the JSON file holds; the same on all ranks."""
    with ranks.together():
        device = torch.device(pick_device(device_of_rank(asked.device, ranks)))
        precision = resolve_precision(asked.precision, device).name
        held = open_all(asked)  # before a checkpoint is downloaded
        files = weights_files(asked)
        models = {name: load_checkpoint(file, cast(WeightsOf, name)) for name, file in files.items()}
    require_same(held.sets, asked.benchmarks, ranks)
    digests = ranks.on_first(lambda: {str(file): sha256_of(file) for file in files.values()})
    found: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        label = name if len(models) > 1 else ""
        model.to(device)
        found[name] = {
            "checkpoint": {"name": files[name].name, "weights": name, "sha256": digests[str(files[name])]},
            **measure_one(asked, held, model, precision, ranks, label),
        }
        model.to("cpu")  # room for the next
    config = next(iter(models.values())).config.to_openclip()
    content: dict[str, Any] = {"format": "cosmos-fast-eval/1", "model": config, "precision": precision}
    content |= next(iter(found.values())) if len(found) == 1 else {"models": found}
    if held.scenes is not None:
        content["data"] = record.data_record(held.scenes, ranks)
    return {**content, "versions": record.versions(), "machine": record.machine()}


def weights_files(asked: Asked) -> dict[str, Path]:
    """Name of a model -> the file it is in. UserError."""
    files = {name: find_weights_file(asked.checkpoint, cast(WeightsOf, name)) for name in asked.weights}
    file = files[asked.weights[0]]
    in_parts = file.name == "manifest.json"
    if len(files) > 1 and len(set(files.values())) == 1 and not in_parts and set(weights_in(file)) != set(BOTH):
        raise UserError(f"--weights both: {file} holds one model, leave it out")
    return files


def open_all(asked: Asked) -> Held:
    """Every set and the shards, before anything is measured. UserError."""
    sets = open_sets(asked.benchmarks, asked.max_samples)
    if asked.classes is not None:
        sets = {name: with_classes(found, asked.classes) for name, found in sets.items()}
    sets = with_protocol(sets, asked.protocol)
    if asked.data is None:
        return Held(sets, None)
    scenes = SceneSet((SourceConfig(path=asked.data),), asked.max_samples, asked.storage)
    for task in asked.tasks:
        if task != "retrieval":
            scenes.require_meta(task)
    return Held(sets, scenes)


def measure_one(
    asked: Asked, held: Held, model: CosmosModel, precision: str, ranks: Ranks, label: str
) -> dict[str, Any]:
    """Records of the tasks and benchmarks of one model, which lies on its device."""
    division = Division(ranks)
    measured = cast(CosmosModel, in_precision(model, precision))
    content: dict[str, Any] = {}
    if held.scenes is not None:
        with progress_bar(ranks.first) as bar:
            results = evaluate_all(measured, dict.fromkeys(asked.tasks, held.scenes), bar, label, division)
        content["tasks"] = record.task_records(results)
    if held.sets:
        settings = Settings(batch_size=asked.batch_size or fitting_batch(measured, ranks), precision=precision)
        results = {name: _on_set(measured, found, settings, label, division) for name, found in held.sets.items()}
        content["benchmarks"] = {name: record.benchmark_record(held.sets[name], one) for name, one in results.items()}
    return content


def _on_set(model: CosmosModel, found: EvalSet, settings: Settings, label: str, division: Division) -> TaskResult:
    """One set, with bars for this rank's part of the images and texts."""
    width = division.ranks.world_size
    with progress_bar(division.ranks.first, unit="") as bar:
        images = bar.add_task(f"{label} {found.name}, images".strip(), total=-(-len(found.images) // width))
        texts = bar.add_task(f"{label} {found.name}, texts".strip(), total=-(-texts_of(found) // width))
        told = replace(settings, on_image=partial(bar.advance, images), on_text=partial(bar.advance, texts))
        try:
            return evaluate_set(model, found, told, division)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"{found.name}: memory ran out with batches of {settings.batch_size}: give a smaller --batch-size, or "
                "--precision bf16"
            ) from None


def show(asked: Asked, content: Mapping[str, Any]) -> None:
    """Tables on stdout."""
    models = record.models_in(content)
    if asked.data is not None:
        results = {
            name: {task: TaskResult(one["metrics"], one["chance"]) for task, one in model["tasks"].items()}
            for name, model in models.items()
        }
        title = f"{asked.checkpoint.name}, {', '.join(models)}, {content['data']['samples']} samples"
        print_table(title, results)
    if asked.benchmarks:
        groups = {}
        for name in asked.benchmarks:
            found = {weights: model["benchmarks"][name] for weights, model in models.items()}
            one = next(iter(found.values()))
            columns = {weights: each["metrics"] for weights, each in found.items()} | {"chance": one["chance"]}
            groups[f"{name}, {one['split']}, {one['protocol']['images']} images"] = (one["task"], columns)
        print_benchmarks(asked.checkpoint.name, groups)
