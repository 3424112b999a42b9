"""`cosmos-fast data inspect`: numbers are those of the shards, bad samples are counted, the sheet has pictures."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosmos_fast.cli.main import command, run
from cosmos_fast.data import inspect
from cosmos_fast.data.synthetic.scene import SceneSettings
from cosmos_fast.data.synthetic.writer import DatasetSettings, write_dataset
from tests.shards import sample, write_tar


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
    train, heldout = inspect.open_sources(dataset)
    assert [Path(index.source.path).name for index in (train, heldout)] == ["train", "heldout"]
    found = inspect.survey(train, limit=1000)
    assert (found.shards, found.samples, found.examined) == (2, 14, 14)
    assert found.member_kinds == {"jpg json mask.png": 14}
    assert found.schemas == {"dreamlip": 14}
    lists = [[v for name, v in record.items() if name != "scene"] for record in records_of(dataset / "train")]
    assert found.sentences == [sum(len(part) for part in parts) for parts in lists]
    assert sum(found.words) == sum(len(s.split()) for parts in lists for part in parts for s in part)
    assert all(48 <= side <= 64 for size in found.sides for side in size)
    assert found.faults == []


def test_limit_spreads_over_the_source(dataset: Path) -> None:
    assert inspect.spread(14, 100) == list(range(14))
    assert inspect.spread(100, 4) == [12, 37, 62, 87]
    found = inspect.survey(inspect.open_sources(dataset / "train")[0], limit=3)
    assert (found.samples, found.examined) == (14, 3)
    assert "(3 samples read)" in inspect.describe(found)


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


def test_contact_sheet_shows_the_pictures(dataset: Path, tmp_path: Path) -> None:
    sheet_path = tmp_path / "deep" / "sheet.png"
    assert run(command, ["data", "inspect", str(dataset), "--samples", "5", "--out", str(sheet_path)]) == 0
    sheet = np.asarray(Image.open(sheet_path).convert("RGB")).astype(np.int16)
    cards = inspect.pick_cards(inspect.open_sources(dataset), 5)
    assert [card.key.split("_")[0] for card in cards] == ["train"] * 3 + ["heldout"] * 2
    row, column = sheet.shape[0] // 2, sheet.shape[1] // 4
    for number, card in enumerate(cards):
        cell = sheet[number // 4 * row : (number // 4 + 1) * row, number % 4 * column : (number % 4 + 1) * column]
        picture = np.asarray(card.image.resize((230, 230))).astype(np.int16)
        centre = cell[60:180, 100:250].reshape(-1, 3).mean(0)
        assert np.abs(centre - picture[46:166, 60:170].reshape(-1, 3).mean(0)).max() < 30
        text = cell[250:].min(axis=2)
        assert (text < 100).sum() > 150  # dark letters below the picture
    assert sheet[row + 20 :, 3 * column :].min() > 240  # five cards: the rest of the second row is empty


def test_default_sheet_lies_beside_the_shards(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, ["data", "inspect", str(dataset / "train"), "--samples", "2"]) == 0
    assert Image.open(dataset / "train" / "inspect.png").size[0] > 600
    assert "sentences a sample: " in capsys.readouterr().out


def test_captions_with_control_characters_are_drawn_as_spaces() -> None:
    assert inspect._printable("a\x1b[31m red\ncircle") == "a [31m red circle"
    card = inspect.Card("k", Image.new("RGB", (40, 1)), ["a\x00b" * 500])
    assert inspect.contact_sheet([card]).size[1] < 500


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
