"""`cosmos-fast visualize`: three kinds of folders, end to end on a tiny model, and every mistake in one line."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cosmos_fast.cli import visualize
from cosmos_fast.cli.main import command, run
from cosmos_fast.config import ModelConfig
from cosmos_fast.data.synthetic.writer import DatasetSettings, write_dataset
from cosmos_fast.evaluate.datasets import registry
from cosmos_fast.model.cosmos import create_model
from tests.benchmark_folders.class_maps import LAYOUTS

TOWERS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
STRANGE = 'a <script>alert("x")</script> & ünï'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of COSMOS and of plain CLIP, a folder of images with captions, shards of scenes."""
    folder = tmp_path_factory.mktemp("visualize")
    for name, crossmodal in (("cosmos", True), ("clip", False)):
        torch.manual_seed(5)
        config = replace(ModelConfig.from_openclip(TOWERS), pool_heads=2, crossmodal=crossmodal)
        metadata = {"format": "cosmos-fast/1", "model": json.dumps(config.to_openclip()), "weights": "teacher"}
        save_file(dict(create_model(config).state_dict()), folder / f"{name}.safetensors", metadata)
    photos = folder / "photos"
    (photos / "more").mkdir(parents=True)
    rng = np.random.default_rng(2)
    for number, name in enumerate(("one.jpg", "two.PNG", "more/three.webp")):
        pixels = rng.integers(0, 255, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / name)
    (photos / "one.txt").write_text(f"{STRANGE}\n\n a dog \n", encoding="utf-8")
    (photos / "two.txt").write_text("a cat\n")
    write_dataset(folder / "data", DatasetSettings(train=1, heldout=4), workers=1)
    return folder


def arguments(place: Path, kind: str, out: Path, *more: str, checkpoint: str = "cosmos.safetensors") -> list[str]:
    return ["visualize", kind, "--checkpoint", str(place / checkpoint), "--out", str(out), *more]


def contents(folder: Path) -> dict:
    """pictures.json, after what holds for every folder."""
    record = json.loads((folder / "pictures.json").read_text())
    assert sorted(record["files"]) == sorted(path.name for path in folder.iterdir())
    assert re.search(r"sha256 [0-9a-f]{64}", record["made"]["checkpoint"])
    page = (folder / "index.html").read_text()
    assert all(source.startswith("data:image/") for source in re.findall(r'(?:src|srcset|href)="([^"]{0,12})', page))
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page
    for sheet in record["sheets"]:
        with Image.open(folder / sheet["file"]) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200
    return record


def test_attention_of_a_folder_with_captions_and_of_one_image(place, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    photos = ("--image", str(place / "photos/one.jpg"), "--image", str(place / "photos/two.PNG"))
    assert run(command, arguments(place, "attention", out, *photos)) == 0
    told = capsys.readouterr()
    assert f"wrote 2 pictures and {out}/index.html" in told.out
    assert "lacks" not in told.err
    sheets = contents(out)["sheets"]
    assert [sheet["of"] for sheet in sheets] == ["one.jpg", "two.PNG"]
    assert [[shown["caption"] for shown in sheet["captions"]] for sheet in sheets] == [[STRANGE, "a dog"], ["a cat"]]
    assert str(place) not in (out / "index.html").read_text() + (out / "pictures.json").read_text()
    more = ("--image", str(place / "photos"), "--caption", "草", "--samples", "2", "--overwrite")
    assert run(command, arguments(place, "attention", out, *more)) == 0
    sheets = contents(out)["sheets"]
    assert [[shown["caption"] for shown in sheet["captions"]] for sheet in sheets] == [["草"]] * 2
    assert "lacks 1 characters (草); index.html shows them" in capsys.readouterr().err


def test_retrieval_in_a_folder_by_its_own_captions_and_by_ones_own_queries(place, tmp_path) -> None:
    assert run(command, arguments(place, "retrieval", tmp_path / "a", "--image", str(place / "photos"))) == 0
    sheets = contents(tmp_path / "a")["sheets"]
    assert [(sheet["by"], sheet["query"]) for sheet in sheets] == [
        ("text", STRANGE),
        ("text", "a cat"),
        ("image", "one.jpg"),
        ("image", "two.PNG"),
    ]
    assert all(sheet["rank_of_the_right_one"] in (1, 2, 3) for sheet in sheets)
    queries = ("--text", "a dog", "--text", "a house", "--query", str(place / "photos/two.PNG"), "--top", "2")
    assert run(command, arguments(place, "retrieval", tmp_path / "b", "--image", str(place / "photos"), *queries)) == 0
    sheets = contents(tmp_path / "b")["sheets"]
    assert [len(sheet["answers"]) for sheet in sheets] == [2, 2, 2]
    assert {answer["right"] for answer in sheets[1]["answers"]} == {None}
    assert {answer["item"] for answer in sheets[2]["answers"]} <= {STRANGE, "a dog", "a cat"}


@pytest.mark.parametrize("kind", ["attention", "retrieval", "segmentation"])
def test_shards_of_scenes_have_all_three(place, tmp_path, kind) -> None:
    data = ("--data", str(place / "data/heldout"), "--max-samples", "3", "--samples", "2")
    assert run(command, arguments(place, kind, tmp_path / "out", *data)) == 0
    sheets = contents(tmp_path / "out")["sheets"]
    assert len(sheets) == (4 if kind == "retrieval" else 2)
    if kind == "segmentation":
        assert all(sheet["truth"]["background"] > 0.2 for sheet in sheets)
        assert all(0 <= sheet["pixels_right"] <= 1 for sheet in sheets)
    if kind == "attention":
        assert all(len(sheet["captions"]) == 3 for sheet in sheets)


def test_segmentation_by_ones_own_classes(place, tmp_path) -> None:
    photo = ("--image", str(place / "photos/one.jpg"))
    named = ("--class", "background;wall", "--class", "dog")
    assert (
        run(command, arguments(place, "segmentation", tmp_path / "a", *photo, *named, "--protocol", "csa=false")) == 0
    )
    (sheet,) = contents(tmp_path / "a")["sheets"]
    assert set(sheet["predicted"]) <= {"background", "dog"}
    assert sheet["truth"] is None
    assert "without correlative self-attention" in (tmp_path / "a/index.html").read_text()
    file = tmp_path / "classes.json"
    file.write_text('{"classes": ["dog", ["grass", "lawn"]], "templates": ["{}"]}')
    assert run(command, arguments(place, "segmentation", tmp_path / "b", *photo, "--classes", str(file))) == 0
    assert set(contents(tmp_path / "b")["sheets"][0]["predicted"]) <= {"dog", "grass"}


def test_a_benchmark_is_looked_at_by_its_reader(place, tmp_path) -> None:
    reader = "captions"
    assert reader in registry.READERS
    benchmark = ("--benchmark", f"{reader}={place / 'captioned'}", "--samples", "1")
    (place / "captioned").mkdir(exist_ok=True)
    for name in ("one.jpg", "one.txt"):
        (place / "captioned" / name).write_bytes((place / "photos" / name).read_bytes())
    assert run(command, arguments(place, "retrieval", tmp_path / "out", *benchmark)) == 0
    record = contents(tmp_path / "out")
    assert [sheet["rank_of_the_right_one"] for sheet in record["sheets"]] == [1, 1]
    assert reader in record["made"]["images"]


def test_maps_of_a_benchmark_stand_beside_the_models(place, tmp_path) -> None:
    layout = LAYOUTS["voc21"]
    root = layout.write(tmp_path / "voc")
    given = ("--benchmark", f"voc21={root}", "--protocol", "scale=1", "--protocol", "prob_threshold=0.9")
    assert run(command, arguments(place, "segmentation", tmp_path / "out", *given)) == 0
    sheets = contents(tmp_path / "out")["sheets"]
    assert len(sheets) == len(layout.ids)
    for number, sheet in enumerate(sheets):
        truth = layout.truth(number)
        assert sheet["pixels"] == [truth.shape[1], truth.shape[0]]
        assert sheet["predicted"] == {"background": 1.0}  # of 21 classes none can be that likely at this scale
        assert sheet["truth"]["background"] == pytest.approx((truth == 0).mean(), abs=1e-6)
        assert sheet["pixels_right"] == pytest.approx((truth == 0).sum() / (truth != 255).sum(), abs=1e-6)


def test_weights_without_crossmodal_heads_do_what_they_can(place, tmp_path, capsys) -> None:
    photos = ("--image", str(place / "photos"))
    plain = {"checkpoint": "clip.safetensors"}
    assert run(command, arguments(place, "attention", tmp_path / "a", *photos, "--caption", "x", **plain)) == 2
    assert "no cross-modal heads" in capsys.readouterr().err
    assert run(command, arguments(place, "retrieval", tmp_path / "b", *photos, "--text", "x", **plain)) == 0
    named = ("--class", "x", "--class", "y", "--samples", "1")
    assert run(command, arguments(place, "segmentation", tmp_path / "c", *photos, *named, **plain)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]


def test_only_former_pictures_are_replaced_and_only_when_told(place, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    call = arguments(place, "attention", out, "--image", str(place / "photos/one.jpg"))
    out.mkdir()
    assert run(command, call) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run(command, call) == 2
    assert "holds former pictures" in capsys.readouterr().err
    (out / "mine.txt").write_text("x")
    assert run(command, [*call, "--overwrite"]) == 2
    assert "mine.txt, which is no picture of a former call" in capsys.readouterr().err
    (out / "mine.txt").unlink()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run(command, [*call, "--overwrite", "--caption", "new"]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_digest_is_of_the_checkpoint_that_is_shown(place, tmp_path, monkeypatch) -> None:
    first, later = (tmp_path / f"run/checkpoints/step_0000000{number}" for number in (1, 2))
    first.mkdir(parents=True)
    shutil.copy(place / "cosmos.safetensors", first / "teacher.safetensors")
    (first / "manifest.json").write_text("{}")

    def meanwhile(unit: str, total: int, make: Callable[..., Any]) -> list[Any]:
        first.rename(later)
        (later / "teacher.safetensors").write_bytes(b"another")
        return list(make(lambda: None))

    monkeypatch.setattr(visualize, "with_bar", meanwhile)
    given = ("--image", str(place / "photos/one.jpg"), "--checkpoint", str(tmp_path / "run"))
    assert run(command, arguments(place, "attention", tmp_path / "out", *given)) == 0
    shown = hashlib.sha256((place / "cosmos.safetensors").read_bytes()).hexdigest()
    assert contents(tmp_path / "out")["made"]["checkpoint"] == f"teacher.safetensors, teacher, sha256 {shown}"


def test_what_fails_half_way_leaves_the_former_pictures(place, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    call = arguments(place, "attention", out, "--image", str(place / "photos/one.jpg"))
    assert run(command, call) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    written = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.name == "index.html":
            raise OSError(28, "No space left on device")
        return written(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert run(command, [*call, "--overwrite"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


PHOTO = ("--image", "{place}/photos/one.jpg")
MISTAKES = {
    "nothing to look at": ("attention", (), "give one of --image"),
    "two things to look at": ("attention", (*PHOTO, "--data", "{place}/data/heldout"), "give one of --image"),
    "no such image": ("attention", ("--image", "{place}/nowhere.jpg"), "nowhere.jpg does not exist"),
    "no image": ("attention", ("--image", "{place}/clip.safetensors", "--caption", "x"), "cannot be shown"),
    "a folder without images": ("attention", ("--image", "{place}/data/train"), "holds no image"),
    "no caption": ("attention", ("--image", "{place}/photos/more"), "no caption for three.webp"),
    "no such checkpoint": ("attention", (*PHOTO, "--checkpoint", "{place}/none"), "none does not exist"),
    "no checkpoint": ("attention", (*PHOTO, "--checkpoint", "{place}/photos/one.jpg"), "one.jpg"),
    "no folder to write to": ("attention", (*PHOTO, "--out", "{place}/none/out"), "does not exist: make it"),
    "a file to write to": ("attention", (*PHOTO, "--out", "{place}/photos/one.jpg"), "is a file"),
    "no such shards": ("retrieval", ("--data", "{place}/nowhere"), "nowhere"),
    "no query": ("retrieval", ("--image", "{place}/photos/more"), "say what to look for"),
    "no such query": ("retrieval", (*PHOTO, "--query", "{place}/no.jpg"), "no.jpg cannot be shown"),
    "no such set": ("retrieval", ("--benchmark", "cocoa={place}"), "'cocoa': did you mean coco"),
    "no path of a set": ("retrieval", ("--benchmark", "coco"), "write NAME=PATH"),
    "no classes": ("segmentation", PHOTO, "name them with --class"),
    "no class file": ("segmentation", (*PHOTO, "--classes", "{place}/none.txt"), "none.txt"),
    "another setting": ("segmentation", (*PHOTO, "--set", "run.batch_size=2"), "data.remote"),
    "no such device": ("segmentation", (*PHOTO, "--device", "abacus"), "abacus"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line_and_leave_nothing(place, tmp_path, capsys, mistake) -> None:
    kind, more, message = MISTAKES[mistake]
    given = [part.format(place=place) for part in more]
    assert run(command, arguments(place, kind, tmp_path / "out", *given)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error:", "Error:"))]
    assert len(lines) == 1
    assert message in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_under_a_launcher_nothing_is_made(place, tmp_path, monkeypatch, capsys) -> None:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert run(command, arguments(place, "attention", tmp_path / "out", "--image", str(place / "photos"))) == 2
    assert "without a launcher" in capsys.readouterr().err


def test_the_page_of_the_docs_runs_as_written(place, tmp_path, monkeypatch) -> None:
    """Its commands on image files run; those on data sets are understood."""
    text = (Path(__file__).parents[2] / "docs/pictures.md").read_text()
    lines = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("cosmos-fast ")]
    assert {line[1] for line in lines} == {"attention", "retrieval", "segmentation"}
    wide = {**TOWERS, "vision_cfg": {**TOWERS["vision_cfg"], "width": 64, "head_width": 64}}
    wide["text_cfg"] = {**TOWERS["text_cfg"], "width": 64, "heads": 1}
    weights = create_model(ModelConfig.from_openclip(wide)).state_dict()
    monkeypatch.chdir(tmp_path)
    torch.save({"epoch": 1, "name": "x", "student": weights, "teacher": weights}, "cosmos.pt")
    Path("photos").symlink_to(place / "photos")
    Path("dog.jpg").symlink_to(place / "photos/one.jpg")
    for _, kind, *given in lines:
        if "--image" in given:
            assert run(command, ["visualize", kind, *given]) == 0
            assert (Path(given[given.index("--out") + 1]) / "index.html").is_file()
        else:
            visualize.command.commands[kind].make_context(kind, given)
