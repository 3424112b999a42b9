"""`eval run --benchmark`, `eval sets`, `eval compare`: published sets through the command, against a plain loop."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cosmos_fast.cli.eval import command
from cosmos_fast.cli.main import run as run_command
from cosmos_fast.evaluate.datasets.registry import READERS, open_set
from cosmos_fast.evaluate.datasets.sets import ClassificationSet, RetrievalSet, part_of
from cosmos_fast.model.checkpoints import load_checkpoint
from cosmos_fast.model.cosmos import CosmosModel
from tests.fake_sets import FAKE_READERS, accuracy_alone, fake_captions, fake_classes, recalls_alone
from tests.unit.test_eval_cli import tiny_config, write_run


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, reader in FAKE_READERS.items():
        monkeypatch.setitem(READERS, name, reader)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_run(folder / "cosmos", tiny_config("demo", folder))
    (folder / "set").mkdir()
    return folder


def arguments(place: Path, out: Path | None, *more: str, benchmark: str = "fake={place}/set") -> list[str]:
    written = [] if out is None else ["--out", str(out)]
    given = ["run", "--checkpoint", str(place / "cosmos"), "--device", "cpu", *written]
    return [*given, *(["--benchmark", benchmark.format(place=place)] if benchmark else []), *more]


def result(place: Path, out: Path, *more: str, benchmark: str = "fake={place}/set") -> dict[str, Any]:
    assert run_command(command, arguments(place, out, *more, benchmark=benchmark)) == 0
    return json.loads(out.read_text())


def test_both_models_on_two_sets_give_what_a_plain_loop_finds(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--benchmark", f"things={place}/set", "--weights", "both", "--batch-size", "3")
    content = result(place, tmp_path / "r.json", *more)
    assert list(content["models"]) == ["teacher", "student"]
    for weights, found in content["models"].items():
        model = load_checkpoint(place / "cosmos", weights)
        expected = recalls_alone(model, fake_captions(place / "set"))
        retrieval = found["benchmarks"]["fake"]
        assert {key: retrieval["metrics"][key] for key in expected} == pytest.approx(expected)
        named = found["benchmarks"]["things"]
        expected = accuracy_alone(model, fake_classes(place))
        assert {key: named["metrics"][key] for key in expected} == pytest.approx(expected)
        assert found["checkpoint"]["name"] == f"{weights}.safetensors"
        assert retrieval["chance"]["t2i_r1"] == pytest.approx(100 / 7)
        assert named["chance"]["mean_per_class"] == pytest.approx(25)
        assert (named["protocol"]["classes"], named["protocol"]["prompts"]) == (4, 12)
        assert retrieval["sha256"] == fake_captions(place / "set").sha256
        assert retrieval["protocol"]["batch_size"] == 3
    teacher, student = (found["benchmarks"]["fake"]["metrics"] for found in content["models"].values())
    assert teacher != student
    assert str(place) not in (tmp_path / "r.json").read_text()
    shown = capsys.readouterr().out
    for text in ("fake, test, 7 images", "things, val, 7 images", "teacher", "student", "chance", "R@10", "top-5"):
        assert text in shown


def test_batches_and_precision_change_nothing_that_matters(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, in_bf16 = CosmosModel.encode_image, []

    def encode(model: CosmosModel, pixels: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        in_bf16.append(torch.is_autocast_enabled("cpu"))
        return plain(model, pixels, normalize)

    monkeypatch.setattr(CosmosModel, "encode_image", encode)
    found = [
        result(place, tmp_path / f"{number}.json", *more)["benchmarks"]["fake"]
        for number, more in enumerate((["--batch-size", "1"], ["--batch-size", "7"], [], ["--precision", "bf16"]))
    ]
    assert found[0]["metrics"] == found[1]["metrics"] == found[2]["metrics"]
    assert [one["protocol"]["batch_size"] for one in found] == [1, 7, 32, 32]
    assert [one["protocol"]["precision"] for one in found] == ["fp32"] * 3 + ["bf16"]
    assert in_bf16 == [False] * (7 + 1 + 1) + [True]


def test_some_samples_are_spread_over_the_set_and_are_another_split(place: Path, tmp_path: Path) -> None:
    whole = result(place, tmp_path / "a.json", benchmark="things={place}/set")["benchmarks"]["things"]
    part = result(place, tmp_path / "b.json", "--max-samples", "3", benchmark="things={place}/set")
    assert part["benchmarks"]["things"]["protocol"]["images"] == 3
    assert part["benchmarks"]["things"]["sha256"] != whole["sha256"]
    all_of_it = result(place, tmp_path / "c.json", "--max-samples", "9", benchmark="things={place}/set")
    assert all_of_it["benchmarks"]["things"] == whole


def test_a_part_has_its_own_answers_and_its_own_digest(place: Path) -> None:
    named, captioned = fake_classes(place), fake_captions(place / "set")
    part = part_of(named, 3)
    assert [part.images.key(number) for number in range(3)] == ["0.jpg", "2.jpg", "4.jpg"]
    assert isinstance(part, ClassificationSet)
    assert part.labels == (0, 0, 1)
    texts = part_of(captioned, 2)
    assert isinstance(texts, RetrievalSet)
    assert texts.captions == (captioned.captions[0], captioned.captions[3])
    assert texts.images.image(1).size == captioned.images.image(3).size
    assert len({part_of(named, count).sha256 for count in range(1, 8)}) == 7


CLASS_FILES = {
    "text": ("names.txt", "cat; kitten\ndog\nbus\nsea; ocean\n"),
    "a list": ("names.json", json.dumps([["cat", "kitten"], "dog", "bus", ["sea", "ocean"]])),
    "templates": ("names.json", json.dumps({"templates": ["a photo of a {}.", "art of the {}"]})),
    "wordings": (
        "names.json",
        json.dumps({"classes": {"x": ["cat", "kitten"], "y": "dog", "z": "bus", "w": ["sea", "ocean"]}}),
    ),
}


@pytest.mark.parametrize("form", CLASS_FILES)
def test_classes_of_ones_own_in_every_form(place: Path, tmp_path: Path, form: str) -> None:
    name, text = CLASS_FILES[form]
    (tmp_path / name).write_text(text)
    plain = result(place, tmp_path / "a.json", benchmark="things={place}/set")["benchmarks"]["things"]
    own = result(place, tmp_path / "b.json", "--classes", str(tmp_path / name), benchmark="things={place}/set")
    assert own["benchmarks"]["things"]["protocol"].pop("class_set") == name
    assert plain["protocol"].pop("class_set") == "fake names"
    assert own["benchmarks"]["things"] == plain
    (tmp_path / name).write_text(json.dumps({"templates": ["{}"]}) if name.endswith("json") else "a\nb\nc\nd")
    other = result(place, tmp_path / "c.json", "--classes", str(tmp_path / name), benchmark="things={place}/set")
    assert other["benchmarks"]["things"]["protocol"]["prompts_sha256"] != plain["protocol"]["prompts_sha256"]


MISTAKES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "nothing to do": ("", (), "give --benchmark NAME=PATH"),
    "no such set": ("fakes={place}/set", (), "did you mean fake?"),
    "no path": ("fake", (), "NAME=PATH"),
    "a set twice": ("fake={place}/set", ("--benchmark", "fake=/b"), "given twice"),
    "no such folder": ("fake={place}/nowhere", (), "nowhere does not exist"),
    "a broken image": ("fake={place}/broken", (), "5.jpg is broken"),
    "no number": ("fake={place}/set", ("--batch-size", "many"), "auto"),
    "a batch of none": ("fake={place}/set", ("--batch-size", "0"), "auto"),
    "classes for captions": ("fake={place}/set", ("--classes", "{place}/three.txt"), "has no classes"),
    "classes for two": ("fake={place}/set", ("--classes", "x", "--benchmark", "things=/x"), "one --benchmark"),
    "classes of another length": ("things={place}", ("--classes", "{place}/three.txt"), "lists 3 classes"),
    "classes that are not there": ("things={place}", ("--classes", "{place}/none.txt"), "cannot be read"),
    "classes in no JSON": ("things={place}", ("--classes", "{place}/bad.json"), "is no JSON"),
    "classes of a wrong kind": ("things={place}", ("--classes", "{place}/kind.json"), "no name of a class"),
    "a template without a place": ("things={place}", ("--classes", "{place}/template.json"), "'{}'"),
    "weights that are not finite": ("fake={place}/set", ("--checkpoint", "{place}/nan"), "NaN"),
    "one model asked for two": ("fake={place}/set", ("--checkpoint", "{place}/one", "--weights", "both"), "one model"),
}


@pytest.fixture
def mistaken(place: Path) -> Path:
    (place / "broken").mkdir(exist_ok=True)
    (place / "broken/broken").touch()
    (place / "three.txt").write_text("a\nb\n\nc\n")
    (place / "bad.json").write_text("{")
    (place / "kind.json").write_text("[1, 2, 3, 4]")
    (place / "template.json").write_text('{"templates": ["a photo"]}')
    model = load_checkpoint(place / "cosmos")
    for name, value in (("one", 1.0), ("nan", float("nan"))):
        weights = {key: tensor.clone() for key, tensor in model.reference_state_dict().items()}
        weights["visual.proj"] *= value
        metadata = {"format": "cosmos-fast/1", "model": json.dumps(model.config.to_openclip()), "weights": "teacher"}
        save_file(weights, place / name, metadata)
        (place / name).rename(place / f"{name}.safetensors")
    return place


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line_and_leave_nothing(
    mistaken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    benchmark, more, message = MISTAKES[mistake]
    changed = [text.format(place=mistaken) for text in more]
    if "--checkpoint" in changed:
        changed[changed.index("--checkpoint") + 1] += ".safetensors"
    assert run_command(command, arguments(mistaken, tmp_path / "r.json", *changed, benchmark=benchmark)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith(("error:", "Error:"))]) == 1
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_memory_that_runs_out_is_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def encode(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(CosmosModel, "encode_image", encode)
    assert run_command(command, arguments(place, tmp_path / "r.json", "--batch-size", "5")) == 2
    said = capsys.readouterr().err
    assert "memory ran out with batches of 5: give a smaller --batch-size" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_sets_lists_what_there_is_and_prints_a_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(command, ["sets"]) == 0
    shown = capsys.readouterr().out
    for name, reader in READERS.items():
        assert re.search(rf"^{name} +{reader.task} +{re.escape(reader.title)}", shown, re.M)
    assert run_command(command, ["sets", "fake"]) == 0
    assert "ROOT/anything" in capsys.readouterr().out
    assert run_command(command, ["sets", "fak"]) == 2
    assert "did you mean fake?" in capsys.readouterr().err


def test_a_reader_serves_several_folders_under_names_of_ones_own(place: Path, tmp_path: Path) -> None:
    (place / "second").mkdir(exist_ok=True)
    (place / "second/other").touch()
    more = ("--benchmark", f"fake:blue={place}/second")
    found = result(place, tmp_path / "r.json", *more)["benchmarks"]
    assert list(found) == ["fake", "fake:blue"]
    assert found["fake"]["sha256"] != found["fake:blue"]["sha256"]
    assert open_set("fake:blue", place / "second").name == "fake:blue"
