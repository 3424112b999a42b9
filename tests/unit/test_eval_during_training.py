"""`train --during-training NAME=PATH`: published sets in the eval rows of a training, as `eval run` measures them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_fast.cli.eval import command as eval_command
from cosmos_fast.cli.main import run as run_command
from cosmos_fast.cli.train import command as train_command
from cosmos_fast.config import load_config
from cosmos_fast.data.synthetic.writer import DatasetSettings, write_dataset
from cosmos_fast.evaluate.datasets.registry import READERS
from cosmos_fast.model.cosmos import CosmosModel
from tests.fake_sets import FAKE_READERS
from tests.unit.test_eval_cli import TINY, tiny_config


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, reader in FAKE_READERS.items():
        monkeypatch.setitem(READERS, name, reader)


def train_arguments(folder: Path, *more: str) -> list[str]:
    settings = (
        *TINY,
        *(f"data.train={folder / 'data/train'}", "data.workers=0", "evaluate.data=null", "name=run"),
        *(f"run.out_dir={folder}", "run.max_steps=2", "run.evaluate_every_steps=1", "schedule.warmup_steps=0"),
        *("evaluate.batch_size=3", "run.device=cpu"),
    )
    return ["--recipe", "demo", *(part for text in settings for part in ("--set", text)), *more]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_hold_what_eval_run_measures_of_the_checkpoint(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_bf16, encode_image = set(), CosmosModel.encode_image

    def watched(self: CosmosModel, *given: Any, **named: Any) -> torch.Tensor:
        in_bf16.add(torch.is_autocast_enabled("cpu"))
        return encode_image(self, *given, **named)

    monkeypatch.setattr(CosmosModel, "encode_image", watched)
    write_dataset(tmp_path / "data", DatasetSettings(train=8, heldout=1), workers=1)
    (tmp_path / "set").mkdir()
    sets = ("--during-training", f"fake={tmp_path / 'set'}", "--set", f"evaluate.benchmarks.things={tmp_path}")
    sets += ("--set", f"evaluate.data={tmp_path / 'data/heldout'}")
    sets += () if precision == "fp32" else ("--set", f"evaluate.precision={precision}")
    assert run_command(train_command, train_arguments(tmp_path, *sets)) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert in_bf16 == {precision == "bf16"}
    evaluated = [row for row in rows if row["kind"] == "eval"]
    assert [(row["step"], row["precision"]) for row in evaluated] == [(1, precision), (2, precision)]
    out, place = tmp_path / "r.json", ("--benchmark", f"fake={tmp_path / 'set'}", "--benchmark", f"things={tmp_path}")
    given = ("--checkpoint", str(tmp_path / "run"), "--weights", "both", "--batch-size", "3", "--device", "cpu")
    assert run_command(eval_command, ["run", *given, *place, "--precision", precision, "--out", str(out)]) == 0
    for weights, found in json.loads(out.read_text())["models"].items():
        for name, keys in (("fake", ("i2t_r1", "t2i_r10")), ("things", ("top1", "mean_per_class"))):
            for key in keys:
                assert evaluated[-1][f"{weights}_{name}_{key}"] == found["benchmarks"][name]["metrics"][key]
                assert evaluated[-1][f"chance_{name}_{key}"] == found["benchmarks"][name]["chance"][key]


MISTAKES = {
    "no such folder": ("fake={folder}/nowhere", "nowhere does not exist"),
    "no such set": ("fakes={folder}", "did you mean fake?"),
    "no path": ("fake", "NAME=PATH"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_stop_the_training_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    given, message = MISTAKES[mistake]
    more = ("--during-training", given.format(folder=tmp_path))
    assert run_command(train_command, train_arguments(tmp_path, *more)) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_precision_that_evaluation_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluate\.precision' is 'fp16'"):
        load_config(tiny_config("demo", tmp_path), ["evaluate.precision=fp16"])


def test_benchmarks_in_a_configuration(tmp_path: Path) -> None:
    config = tiny_config("demo", tmp_path)
    assert load_config(
        config, ["evaluate.benchmarks={coco: /a}", "evaluate.benchmarks.wds:x=2017"]
    ).evaluate.benchmarks == {
        "coco": "/a",
        "wds:x": "2017",
    }
    with pytest.raises(ValueError, match=r"evaluate\.benchmarks"):
        load_config(config, ["evaluate.benchmarks=[coco]"])
