"""`cosmos-fast data inspect`: its numbers are those of the shards, and bad samples are counted by cause."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cosmos_fast.cli.main import command, run
from cosmos_fast.config import TrainConfig
from cosmos_fast.data import inspect
from cosmos_fast.data.histogram import histogram
from cosmos_fast.data.synthetic.scene import SceneSettings
from cosmos_fast.data.synthetic.writer import DatasetSettings, write_dataset
from cosmos_fast.data.tokenizer import tokenize
from cosmos_fast.utils.logging import log_to_file, stop_logging_to
from tests.shards import picture, record, sample, write_tar

DEFAULTS = TrainConfig(name="defaults")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic")
    scene = SceneSettings(min_side=48, max_side=64, max_objects=3)
    write_dataset(out, DatasetSettings(train=14, heldout=5, shard_size=10, scene=scene), workers=1)
    return out


def records_of(folder: Path) -> list[dict[str, list[str]]]:
    records = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            names = [name for name in tar.getnames() if name.endswith(".json")]
            records += [json.loads(tar.extractfile(name).read()) for name in names]  # type: ignore[union-attr]
    return records


def test_survey_counts_what_is_there(dataset: Path) -> None:
    train, heldout = inspect.open_sources(str(dataset))
    assert [Path(index.source.path).name for index in (train, heldout)] == ["train", "heldout"]
    found = inspect.survey(train, DEFAULTS, limit=1000)
    assert (found.shards, found.samples, found.examined) == (2, 14, 14)
    assert found.kinds == {"jpg json mask.png": 14}
    assert found.schemas == {"dreamlip": 14}
    assert found.formats == {"JPEG RGB": 14}
    lists = [[v for name, v in record.items() if name != "scene"] for record in records_of(dataset / "train")]
    assert found.sentences == [sum(len(part) for part in parts) for parts in lists]
    assert sum(found.words) == sum(len(s.split()) for parts in lists for part in parts for s in part)
    assert all(48 <= side <= 64 for size in found.sides for side in size)
    assert len(found.image_bytes) == 14
    assert found.faults == []


def test_token_lengths_are_those_of_the_tokenizer_and_of_the_captions_drawn(tmp_path: Path) -> None:
    """Nine sentences "raw 0", "long ib 0 a", ...: their ids are counted by hand, start and end included."""
    write_tar(tmp_path / "0.tar", {**sample(0), **sample(1)})
    config = TrainConfig(name="x")
    found = inspect.survey(inspect.open_sources(str(tmp_path))[0], config, limit=10)
    assert sorted(found.sentence_tokens) == sorted(2 * [4, 5, 5, 6, 6, 6, 6, 7, 7]) or len(found.sentence_tokens) == 18
    texts = [text for part in json.loads(record(0)).values() for text in part]
    assert found.sentence_tokens[:9] == [int(row.argmax()) + 1 for row in tokenize(texts)]
    assert len(found.global_tokens) == 2 * config.data.views.global_captions
    assert len(found.local_tokens) == 2 * config.data.views.local_captions
    assert set(found.local_tokens) <= set(found.sentence_tokens)
    assert max(found.global_tokens) > max(found.local_tokens)  # up to five sentences in one


def test_captions_over_the_context_length_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = json.dumps({"raw_caption": ["word " * 100]}).encode()
    write_tar(tmp_path / "0.tar", {**sample(0), "z.jpg": picture(9), "z.json": long})
    arguments = ["data", "inspect", str(tmp_path), "--samples", "2"]
    assert run(command, arguments) == 0
    text = capsys.readouterr().out
    assert "global captions longer than 77 tokens, cut: 2 (50.0 %)" in text
    assert "local captions longer than 77 tokens, cut: 6 (50.0 %)" in text
    assert run(command, [*arguments, "--set", "model.text.context_length=16"]) == 0
    assert "local captions longer than 16 tokens, cut: 6 (50.0 %)" in capsys.readouterr().out


def test_formats_and_colour_modes_are_counted_as_stored(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for number, (kind, mode) in enumerate([("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("WEBP", "RGB")]):
        name = f"{number}.{kind.lower()}"
        members |= {name: picture(number, file_format=kind, mode=mode), f"{number}.json": record(number)}
    deep = io.BytesIO()
    Image.new("I;16", (40, 32), 1000).save(deep, "PNG")
    write_tar(tmp_path / "0.tar", {**members, "9.png": deep.getvalue(), "9.json": record(9)})
    found = inspect.survey(inspect.open_sources(str(tmp_path))[0], DEFAULTS, limit=10)
    assert found.formats == {"JPEG RGB": 1, "JPEG CMYK": 1, "PNG RGBA": 1, "WEBP RGB": 1, "PNG I;16": 1}


def test_limit_spreads_over_the_source(dataset: Path) -> None:
    assert inspect.spread(14, 100) == list(range(14))
    assert inspect.spread(100, 4) == [12, 37, 62, 87]
    found = inspect.survey(inspect.open_sources(str(dataset / "train"))[0], DEFAULTS, limit=3)
    assert (found.samples, found.examined) == (14, 3)
    assert "(3 samples read)" in inspect.describe(found)


def test_histograms() -> None:
    assert histogram("nothing", []) is None
    one = histogram("one", [7, 7])
    assert one is not None
    assert one.lines() == ["  one: 7 to 7, median 7, mean 7.0"]
    found = histogram("lengths", [*range(10, 20), *range(10, 20), 43])
    assert found is not None
    assert found.summary == "10 to 43, median 15, mean 15.9"
    assert [(each.label, each.count) for each in found.bins] == [
        *(("10-13", 8), ("14-17", 8), ("18-21", 4)),
        *((label, 0) for label in ("22-25", "26-29", "30-33", "34-37", "38-41")),
        ("42-45", 1),
    ]
    assert [each.length for each in found.bins[:3]] == [1.0, 1.0, 0.5]
    assert found.lines()[1] == f"        10-13 {'█' * 32} 8 (38.1 %)"


def test_bad_samples_are_counted_by_cause_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {**sample(0), **sample(1), **sample(2), **sample(3), **sample(4)}
    members["000001.jpg"] = members["000001.jpg"][:-300]
    members["000002.json"] = b"{not json"
    del members["000003.jpg"]
    write_tar(tmp_path / "00000.tar", members)
    assert run(command, ["data", "inspect", str(tmp_path), "--samples", "4"]) == 0
    text = capsys.readouterr().out
    assert "5 samples in 1 shards" in text
    assert "bad samples: 3" in text
    for cause, key in (("broken or truncated image", 1), ("wrong json", 2), ("missing image member", 3)):
        assert f"    {cause}: 1\n      00000.tar:00000{key}" in text
    assert "members jpg json: 4 (80.0 %)" in text
    assert "members json: 1 (20.0 %)" in text


def test_a_path_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    """In the index, the page, what is printed where that has to be UTF-8, and the log of a run."""
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    write_tar(folder / "00000.tar", sample(0))
    done = subprocess.run(
        [sys.executable, "-m", "cosmos_fast.cli.main", "data", "inspect", folder],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "/\\udcff/inspect.png" in done.stdout
    assert "/\\udcff" in (folder / "inspect.html").read_text(encoding="utf-8")
    handler = log_to_file(tmp_path / "log.txt")
    handler.handle(logging.makeLogRecord({"msg": f"saved {folder}"}))
    stop_logging_to(handler)
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").endswith("/\\udcff\n")


def test_default_results_lie_beside_the_shards(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, ["data", "inspect", str(dataset / "train"), "--samples", "2"]) == 0
    assert Image.open(dataset / "train" / "inspect.png").size[0] > 600
    assert (dataset / "train" / "inspect.html").is_file()
    assert "sentences a sample: " in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["/nowhere/at/all"], ["{00..01.tar"], [".", "--samples", "0"], []])
def test_mistakes_exit_with_2_and_one_line(
    wrong: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(command, ["data", "inspect", *wrong]) == 2
    error = capsys.readouterr().err
    assert "error" in error.lower()
    assert "Traceback" not in error


def test_no_usable_sample_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": b"no picture", "a.json": b"{}"})
    assert run(command, ["data", "inspect", str(tmp_path)]) == 2
    assert "no usable sample" in capsys.readouterr().err


def test_a_caption_that_just_fits_the_context_is_not_cut() -> None:
    found = inspect.Survey("x", 1, 0, 1, 0, context_length=77, global_tokens=[76, 77, 78], local_tokens=[77])
    assert found.cut() == [("global captions", 1, 3), ("local captions", 0, 1)]


def test_a_folder_that_takes_no_files_is_seen_before_anything_is_read(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The working directory is used then; where a file was asked for there, that is said at once."""
    make = tempfile.TemporaryFile

    def read_only(*, dir: Path) -> Any:
        if dir.is_relative_to(dataset):
            raise OSError(errno.EROFS, "Read-only file system")
        return make(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    monkeypatch.chdir(tmp_path)
    before = set(dataset.rglob("*.png"))
    assert run(command, ["data", "inspect", str(dataset / "heldout"), "--samples", "2"]) == 0
    assert "contact sheet of 2 samples: inspect.png, page: inspect.html" in capsys.readouterr().out
    assert Path("inspect.png").is_file()
    assert set(dataset.rglob("*.png")) == before

    def never(*_: object) -> None:
        raise AssertionError("the samples were read")

    monkeypatch.setattr(inspect, "survey", never)
    assert run(command, ["data", "inspect", str(dataset), "--out", str(dataset / "heldout/x.png")]) == 2
    assert "Read-only file system; name another file with --out" in capsys.readouterr().err
