"""`eval compare`: result files side by side, and what makes them incomparable."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cosmos_fast.cli.eval import command
from cosmos_fast.cli.main import run as run_command
from cosmos_fast.evaluate.comparison import compare
from cosmos_fast.evaluate.tables import rows
from cosmos_fast.utils.errors import UserError

METRICS = {f"{way}_{key}": 10.0 for way in ("i2t", "t2i") for key in ("r1", "r5", "r10", "mean_rank", "median_rank")}
COCO = {
    "task": "retrieval",
    "split": "val2017",
    "sha256": "a" * 64,
    "metrics": METRICS,
    "chance": METRICS,
    "protocol": {"images": 5000, "precision": "fp32", "batch_size": 32},
}
IMAGENET = {**COCO, "task": "classification", "split": "val", "metrics": {"top1": 37.1, "top5": 60.0}, "chance": {}}
CHECKPOINT = {"name": "x.pt", "weights": "teacher", "sha256": "b" * 64}


LINES = [f"{way} R@{k}" for way in ("image → text", "text → image") for k in (1, 5, 10)]


def written(path: Path, *, benchmarks: Mapping[str, Any], **changes: Any) -> Path:
    content = {"format": "cosmos-fast-eval/1", "checkpoint": CHECKPOINT, "benchmarks": benchmarks}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, "versions": {"torch": "2.13"}, **changes}))
    return path


def changed(record: Mapping[str, Any], **metrics: float) -> dict[str, Any]:
    found = copy.deepcopy(dict(record))
    found["metrics"].update(metrics)
    return found


def without(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


def test_two_files_stand_side_by_side_with_the_best_and_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = written(tmp_path / "a.json", benchmarks={"coco": COCO, "imagenet": IMAGENET})
    better = changed(COCO, i2t_r1=53.125, i2t_mean_rank=4.0)
    better["protocol"]["precision"] = "bf16"
    b = written(tmp_path / "b.json", benchmarks={"coco": better}, versions={"torch": "2.6"})
    assert run_command(command, ["compare", str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    for text in ("coco, val2017", "a teacher", "b teacher", "53.12", "10.00", *LINES, "imagenet: in a teacher only"):
        assert text in shown
    assert "coco: precision is fp32 in a teacher, bf16 in b teacher" in shown
    assert f"version of torch is 2.13 in {a}, 2.6 in {b}" in shown
    assert "batch_size" not in shown
    assert "top-1" not in shown


def test_the_best_is_marked_as_it_is_printed_and_only_where_there_is_one() -> None:
    numbers = {
        "a": {"i2t_r1": 10.0, "i2t_mean_rank": 3.0},
        "b": {"i2t_r1": 9.0, "i2t_mean_rank": 2.0},
        "c": {"i2t_r1": 9.999},
    }
    best = {row.label: row.best() for row in rows("retrieval", numbers)}
    assert best == {"image → text R@1": {"a", "c"}, "image → text mean rank": {"b"}}
    (equal,) = rows("classification", {"a": {"top1": 5.0}, "b": {"top1": 5.001}})
    (alone,) = rows("classification", {"a": {"top1": 5.0}, "b": {"miou": 3.0, "top1": float("nan")}})
    assert equal.best() == alone.best() == set()


def test_models_of_one_file_and_files_of_one_name_have_columns_of_their_own(tmp_path: Path) -> None:
    both = {name: {"checkpoint": CHECKPOINT, "benchmarks": {"coco": COCO}} for name in ("teacher", "student")}
    files = [written(tmp_path / name / "r.json", benchmarks={"coco": COCO}) for name in ("x", "y")]
    models = written(tmp_path / "z.json", benchmarks={}, models=both)
    (_, columns) = compare([*files, models]).groups["coco, val2017"]
    assert list(columns) == [f"{files[0]} teacher", f"{files[1]} teacher", "z teacher", "z student"]


def test_other_questions_are_refused_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = written(tmp_path / "a.json", benchmarks={"coco": COCO})
    b = written(tmp_path / "b.json", benchmarks={"coco": {**COCO, "sha256": "c" * 64}})
    assert run_command(command, ["compare", str(a), str(b)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "coco: images or answers differ (split hash aaaaaaaaaaaa in a teacher, cccccccccccc in b teacher)" in error
    assert run_command(command, ["compare", str(a), str(b), "--anyway"]) == 0
    assert "coco: DIFFERENT QUESTIONS" in capsys.readouterr().out


def test_held_out_shards_are_compared_by_their_digest(tmp_path: Path) -> None:
    task = {"metrics": {"i2t_r1": 4.0}, "chance": {}, "protocol": {}}
    files = [
        written(tmp_path / f"{name}.json", benchmarks={}, tasks={"retrieval": task}, data={"sha256": digest})
        for name, digest in (("a", "1"), ("b", "1"), ("c", "2"))
    ]
    task_of, columns = compare(files[:2]).groups["--data, retrieval"]
    assert (task_of, list(columns)) == ("retrieval", ["a teacher", "b teacher"])
    with pytest.raises(UserError, match="differ"):
        compare(files)


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "a set without its hash": ({"benchmarks": {"coco": without(COCO, "sha256")}}, "coco: its sha256 is missing"),
    "a set without its split": ({"benchmarks": {"coco": without(COCO, "split")}}, "coco: its split is missing"),
    "a task that is no text": ({"benchmarks": {"coco": {**COCO, "task": 3}}}, "coco: its task is missing or no text"),
    "a list of metrics": ({"benchmarks": {"coco": {**COCO, "metrics": []}}}, "coco: its metrics is missing or no obj"),
    "a metric that is no number": (
        {"benchmarks": {"coco": {**COCO, "metrics": {"i2t_r1": "10"}}}},
        "coco: its i2t_r1 is no number",
    ),
    "a list of versions": ({"benchmarks": {"coco": COCO}, "versions": []}, "its versions is missing or no object"),
    "data without a hash": ({"benchmarks": {"coco": COCO}, "data": {}}, "data: its sha256 is missing"),
    "another task": (
        {"benchmarks": {"coco": {**COCO, "task": "segmentation"}}},
        "coco stands for different tasks (retrieval in a teacher, segmentation in b teacher)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_result_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    content, message = DAMAGED[damage]
    whole = written(tmp_path / "a.json", benchmarks={"coco": COCO})
    damaged = written(tmp_path / "b.json", **content)
    assert run_command(command, ["compare", str(whole), str(damaged)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_file_given_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(written(tmp_path / "a.json", benchmarks={"coco": COCO}))
    assert run_command(command, ["compare", file, file]) == 2
    assert capsys.readouterr().err == f"error: {file} is given twice: give each result file once\n"


MISTAKES = {
    "one file": (None, "two result files or more"),
    "no such file": ("nowhere", "cannot be read (No such file or directory)"),
    "no JSON": ("{", "no result of `eval run --out`"),
    "another JSON": ("[1]", "no result of `eval run --out`"),
    "another format": ('{"format": "x/1"}', "its format is 'x/1'"),
    "half a result": ('{"format": "cosmos-fast-eval/1", "models": 3}', "no result of `eval run --out`"),
    "a set without numbers": ('{"format": "cosmos-fast-eval/1", "models": {"a": {"tasks": {"b": {}}}}}', "no result"),
    "nothing in common": ("imagenet", "no evaluation set in common"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str) -> None:
    text, message = MISTAKES[mistake]
    files = [written(tmp_path / "a.json", benchmarks={"coco": COCO}), tmp_path / "b.json"]
    if text == "imagenet":
        written(files[1], benchmarks={"imagenet": IMAGENET})
    elif text is not None and text != "nowhere":
        files[1].write_text(text)
    assert run_command(command, ["compare", *map(str, files[: 1 if text is None else 2])]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
