"""Every classification set through `eval run --benchmark`, against classes compared one by one on pictures known by
number: the readers have no part in what is expected."""

from __future__ import annotations

import inspect
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from cosmos_fast.cli.eval import command
from cosmos_fast.cli.main import run as run_command
from cosmos_fast.data.images import eval_crop, to_tensor
from cosmos_fast.data.tokenizer import tokenize
from cosmos_fast.evaluate.datasets.class_sets import published
from cosmos_fast.model.checkpoints import load_checkpoint
from cosmos_fast.model.cosmos import CosmosModel
from tests.benchmark_folders.answers import Answers
from tests.benchmark_folders.captions import write_wds
from tests.benchmark_folders.classes import LAYOUTS
from tests.shards import picture
from tests.unit.test_eval_cli import tiny_config, write_run

# One layout a set; ImageNet's 80,000 prompts take a while.
QUICK = [layout for layout in {name: layout for layout, (name, _) in LAYOUTS.items()}.values() if layout != "imagenet"]
REST = [layout for layout in LAYOUTS if layout not in QUICK]


class Oracle:
    """Features of a model and their scores; a class is encoded once."""

    def __init__(self, model: CosmosModel) -> None:
        self.model = model
        self.text = cache(self._text)

    @torch.no_grad()
    def _text(self, prompts: tuple[str, ...]) -> torch.Tensor:
        """[D] of a class: the mean of normalised prompts, normalised."""
        tokens = tokenize(list(prompts), self.model.config.text.context_length)
        return normalize(normalize(self.model.encode_text(tokens).double(), dim=-1).mean(0), dim=-1)

    @torch.no_grad()
    def images(self, answers: Answers) -> torch.Tensor:
        """[N, D], a picture at a time; those that are shown again are not encoded again."""
        size = self.model.config.vision.image_size
        known = {
            number: self.model.encode_image(to_tensor(eval_crop(answers.image(number), size))[None])[0].double()
            for number in set(answers.pictures)
        }
        return torch.stack([normalize(known[number], dim=-1) for number in answers.pictures])

    def scores(self, templates: Sequence[str], answers: Answers) -> torch.Tensor:
        """[N, C]."""
        text = [self.text(tuple(template.replace("{}", one) for template in templates)) for one in answers.names]
        return self.images(answers) @ torch.stack(text).T


def metrics(scores: list[list[float]], answers: Answers, rounding: float) -> dict[str, float]:
    """Accuracies by counting, for every image, the classes that are not below its own by more than `rounding`; of two
    classes of one name the first is the answer."""
    ranks = []
    for row, label in zip(scores, answers.labels, strict=True):
        alike = [number for number, name in enumerate(answers.names) if name == answers.names[label]]
        others = (score for number, score in enumerate(row) if number not in alike)
        ranks.append(1 + alike.index(label) + sum(score >= row[label] + rounding for score in others))
    hits: dict[int, list[bool]] = {label: [] for label in answers.labels}
    for label, rank in zip(answers.labels, ranks, strict=True):
        hits[label].append(rank == 1)
    per_class = [sum(one) / len(one) for one in hits.values()]
    found = {f"top{k}": 100 * sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5)}
    return {**found, "mean_per_class": 100 * sum(per_class) / len(per_class)}


# The place that the right class of an image has in a model's order, where labels can be chosen: hits and misses.
PLACES = (0, 2, 5, 4, 0)


def write_hits(oracle: Oracle, layout: str, root: Path) -> Answers:
    """A set with labels of which the model hits some, where its images are listed."""
    name, write = LAYOUTS[layout]
    answers = write(root)
    if "labels" not in inspect.signature(write).parameters:
        return answers
    shutil.rmtree(root)
    order = oracle.scores(published()[name]["templates"], answers).argsort(dim=1, descending=True).tolist()
    return write(root, tuple(row[place] for row, place in zip(order, PLACES, strict=False)))


def run_eval(folder: Path, given: list[str]) -> dict[str, Any]:
    """The "benchmarks" of the command's file, of the model in `folder / "run"`."""
    out = folder / "r.json"
    arguments = ["run", "--checkpoint", str(folder / "run"), "--device", "cpu", "--batch-size", "16"]
    assert run_command(command, [*arguments, *given, "--out", str(out)]) == 0
    return json.loads(out.read_text())["benchmarks"]


def evaluate(folder: Path, layouts: list[str]) -> dict[str, dict[str, float]]:
    """The command on these layouts, its numbers compared: a layout's metrics."""
    write_run(folder / "run", tiny_config("demo", folder))
    oracle = Oracle(load_checkpoint(folder / "run", "teacher"))
    given, answers = [], {}
    for place, layout in enumerate(layouts):
        key, root = f"{LAYOUTS[layout][0]}:{place}", folder / f"set{place}"
        answers[key] = write_hits(oracle, layout, root)
        given += ["--benchmark", f"{key}={root}"]
    found = run_eval(folder, given)
    assert list(found) == list(answers)
    for key, wanted in answers.items():
        scores = oracle.scores(published()[key.partition(":")[0]]["templates"], wanted).tolist()
        least, most = metrics(scores, wanted, -1e-6), metrics(scores, wanted, 1e-6)
        for metric, value in found[key]["metrics"].items():
            assert least[metric] - 1e-9 <= value <= most[metric] + 1e-9, (key, metric)
        assert found[key]["protocol"]["images"] == len(wanted.labels)
        assert found[key]["protocol"]["classes"] == len(wanted.names)
        assert found[key]["chance"]["top1"] == pytest.approx(100 / len(wanted.names))
        assert (found[key]["split"], found[key]["task"]) == (wanted.split, "classification")
    return {layout: found[key]["metrics"] for layout, key in zip(layouts, found, strict=True)}


def test_every_classification_set_is_evaluated_as_class_by_class(tmp_path: Path) -> None:
    found = evaluate(tmp_path, QUICK)
    assert sum(metrics["top1"] for metrics in found.values()) / len(found) > 20  # no numbers of chance


def test_of_two_classes_of_one_name_the_first_is_answered(tmp_path: Path) -> None:
    write_run(tmp_path / "run", tiny_config("demo", tmp_path))
    root = write_wds(tmp_path / "set", "classification")
    templates = ("a photo of a {}.", "the {}")
    wanted = Answers(tuple(range(6)), (0, 1, 2, 0, 1, 2), ("tench", "great white shark"), image=webp)
    oracle = Oracle(load_checkpoint(tmp_path / "run", "teacher"))
    # The name that picture 0, of class 0, is answered with stands twice, and first.
    best = int(oracle.scores(templates, wanted)[0].argmax())
    names = (wanted.names[best], wanted.names[1 - best], wanted.names[best])
    (root / "classnames.txt").write_text("\n".join(names))
    wanted = replace(wanted, names=names)
    found = run_eval(tmp_path, ["--benchmark", f"imagenet={root}"])["imagenet"]["metrics"]
    scores = oracle.scores(templates, wanted).tolist()
    assert metrics(scores, wanted, 1e-6) == metrics(scores, wanted, -1e-6)  # rounding decides nothing
    assert found == pytest.approx(metrics(scores, wanted, 0))
    assert found["top1"] > 0


def webp(number: int) -> Image.Image:
    """As `write_wds` has it."""
    return Image.open(io.BytesIO(picture(number, 24 + 8 * number, 40, "WEBP"))).convert("RGB")


@pytest.mark.long
def test_imagenet_and_the_other_layouts_are_too(tmp_path: Path) -> None:
    evaluate(tmp_path, REST)
