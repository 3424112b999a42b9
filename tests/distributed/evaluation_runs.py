"""Evaluations that several ranks divide among them; what each rank gets goes to a file."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cosmos_fast.cli.eval import run as run_command
from cosmos_fast.config import SourceConfig, TrainConfig, load_config
from cosmos_fast.evaluate import prompts, record, scenes, segmented_sets
from cosmos_fast.evaluate.datasets.registry import open_set
from cosmos_fast.evaluate.division import Division
from cosmos_fast.evaluate.published import evaluate_set
from cosmos_fast.evaluate.set_runs import Settings
from cosmos_fast.evaluate.tasks import TASKS, evaluate
from cosmos_fast.evaluate.validators import build_validators
from cosmos_fast.model import load_checkpoint
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.ranks import Ranks, joined_ranks
from tests.fake_sets import FAKE_READERS, FakeImages, register

# Samples of a block: 12 scenes are three blocks of uneven size, or one, which leaves most ranks without work.
BLOCKS = (5, 20)
TEXT_BATCH = 7
SET_BLOCKS = (2, 9)  # of seven images
IMAGES_A_BLOCK = 2  # that are segmented: four blocks
FAILS = 1  # the rank that cannot read, once


def measured(place: Path, config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """Every task and the validator of a training, for each size of the blocks."""
    prompts.TEXT_BATCH = TEXT_BATCH
    student, teacher = (load_checkpoint(place / "cosmos", weights) for weights in ("student", "teacher"))
    found: dict[str, Any] = {}
    for size in BLOCKS:
        scenes.BLOCK = size
        held = scenes.SceneSet((SourceConfig(path=str(place / "data/heldout")),))
        for task in TASKS:
            found[f"{task} {size}"] = asdict(evaluate(teacher, held, task, division=Division(ranks)))
        found[f"skipped {size}"] = record.data_record(held, ranks)["skipped"]
        sized = load_config(config, [f"evaluate.batch_size={size}"])
        (validator,) = build_validators(sized, Division(ranks))
        found[f"validator {size}"] = validator(3, student, teacher)
    return found


def measured_sets(place: Path, ranks: Ranks) -> dict[str, Any]:
    """Published sets, in many blocks and in one, which leaves ranks without work; and the validator of a training."""
    prompts.TEXT_BATCH = TEXT_BATCH
    segmented_sets.IMAGES_A_BLOCK = IMAGES_A_BLOCK
    register()
    model = load_checkpoint(place / "cosmos")
    found: dict[str, Any] = {}
    for size in SET_BLOCKS:
        for name in FAKE_READERS:
            one = open_set(name, place)
            found[f"{name} {size}"] = asdict(evaluate_set(model, one, Settings(batch_size=size), Division(ranks)))
    sets = ", ".join(f"{name}: {place}" for name in FAKE_READERS)
    config = load_config(TrainConfig(name="sets"), [f"evaluate.benchmarks={{{sets}}}"])
    (validator,) = build_validators(config, Division(ranks))
    found["validator"] = validator(3, model, model)
    return found


def failure_in_a_set(place: Path, ranks: Ranks) -> str:
    """What each rank says where one of them has a broken image."""
    found = open_set("fake", place)
    if ranks.rank == FAILS:
        found = replace(found, images=FakeImages(broken=frozenset(range(len(found.images)))))
    try:
        evaluate_set(load_checkpoint(place / "cosmos"), found, Settings(batch_size=2), Division(ranks))
    except UserError as error:
        return str(error)
    return ""


def run_all(place: Path, config: TrainConfig, out: str) -> None:
    """What one rank finds, and how it hears of another's failure."""
    with joined_ranks("cpu") as ranks:
        found = measured(place, config, ranks)
        found["sets"] = measured_sets(place, ranks)
        found["set failure"] = failure_in_a_set(place, ranks)
        plain = scenes.read_scene

        def read(*arguments: Any) -> scenes.Scene:
            if ranks.rank == FAILS:
                raise UserError("the disk has gone")
            return plain(*arguments)

        scenes.read_scene, scenes.BLOCK = read, BLOCKS[0]
        held = scenes.SceneSet((SourceConfig(path=str(place / "data/heldout")),))
        try:
            evaluate(load_checkpoint(place / "cosmos"), held, "retrieval", division=Division(ranks))
        except UserError as error:
            found["failure"] = str(error)
        Path(out, f"{ranks.rank}.json").write_text(json.dumps(found))


def run_cli(place: Path, out: str) -> None:
    """`eval run` as a launcher starts it."""
    scenes.BLOCK = BLOCKS[0]
    register()
    arguments = ["--checkpoint", str(place / "cosmos"), "--data", str(place / "data/heldout"), "--device", "cpu"]
    sets = ["--benchmark", f"fake={place}", "--batch-size", str(SET_BLOCKS[0])]
    run_command.main([*arguments, *sets, "--tasks", "retrieval", "--out", out], standalone_mode=False)
