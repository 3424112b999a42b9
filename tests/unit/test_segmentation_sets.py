"""The eight segmentation sets through `eval run --benchmark`, against the protocol of the paper as a plain loop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from cosmos_fast.cli.eval import command
from cosmos_fast.cli.main import run as run_command
from cosmos_fast.data.images import decode, normalize
from cosmos_fast.data.tokenizer import tokenize
from cosmos_fast.evaluate.class_files import with_classes
from cosmos_fast.evaluate.datasets import class_map_files
from cosmos_fast.evaluate.datasets.registry import open_set
from cosmos_fast.evaluate.pixels import segmentation_view
from cosmos_fast.evaluate.prompts import fill_templates
from cosmos_fast.evaluate.protocols import parse, with_protocol
from cosmos_fast.evaluate.published import evaluate_set
from cosmos_fast.evaluate.segmentation import IGNORE, SegmentationProtocol
from cosmos_fast.evaluate.set_runs import class_protocol
from cosmos_fast.model.checkpoints import load_checkpoint
from cosmos_fast.model.cosmos import CosmosModel
from cosmos_fast.utils.errors import UserError
from tests.benchmark_folders.class_maps import LAYOUTS, png
from tests.fake_sets import fake_classes, fake_maps
from tests.shards import picture
from tests.unit.test_eval_cli import tiny_config, write_run

NAMES = tuple(name for name in LAYOUTS if ":" not in name)
TEMPLATES = ("a photo of a {}.", "the {}")
# Short side in windows, scale, threshold of probability and of area: the paper's, by set.
PAPER = {
    "voc21": (1.5, 65, 0.1, 0.1),
    "context60": (1.5, 50, 0.1, 0),
    "coco_object": (1.5, 50, 0.1, 0),
    "voc20": (1.5, 40, 0, 0),
    "cityscapes": (2.5, 40, 0, 0),
    "context59": (1.5, 40, 0, 0),
    "ade20k": (1.5, 40, 0, 0),
    "coco_stuff": (2.0, 40, 0, 0),
}


@pytest.mark.parametrize("shape", [(40, 24), (50, 97)])
def test_bilinear_views_are_means_of_four_pixels(shape: tuple[int, int]) -> None:
    """Against the formula, as OpenCV resizes: no antialiasing, 8 bits."""
    image = decode(picture(3, shape[1], shape[0], "PNG"))
    pixels = np.asarray(image).astype(float)
    view = segmentation_view(image, 16, SegmentationProtocol(interpolation="bilinear"))
    assert min(view.shape[1:]) == 24
    expected = np.zeros((*view.shape[1:], 3))
    for y, x in np.ndindex(*view.shape[1:]):
        at = [(place + 0.5) * shape[axis] / view.shape[1 + axis] - 0.5 for axis, place in enumerate((y, x))]
        low = [min(max(int(np.floor(value)), 0), shape[axis] - 1) for axis, value in enumerate(at)]
        share = [min(max(value - low[axis], 0.0), 1.0) for axis, value in enumerate(at)]
        high = [min(value + 1, shape[axis] - 1) for axis, value in enumerate(low)]
        rows = [pixels[row, low[1]] * (1 - share[1]) + pixels[row, high[1]] * share[1] for row in (low[0], high[0])]
        expected[y, x] = rows[0] * (1 - share[0]) + rows[1] * share[0]
    rounded = normalize(torch.from_numpy(expected.round().astype(np.uint8)).permute(2, 0, 1))
    assert (view - rounded).abs().max() < 0.02  # a level is 0.014: halves may be rounded either way
    assert ((view - rounded).abs() > 1e-4).float().mean() < 0.02


def text_features(model: CosmosModel, names: Sequence[str]) -> torch.Tensor:
    """[C, D]: mean over templates of normalised features, one text at a time."""
    rows = []
    for name in names:
        texts = [template.replace("{}", class_map_files.wording(name)) for template in TEMPLATES]
        tokens = tokenize(texts, model.config.text.context_length)
        rows.append(functional.normalize(model.encode_text(tokens), dim=-1).mean(dim=0))
    return functional.normalize(torch.stack(rows), dim=-1)


def classes_found(model: CosmosModel, image: Image.Image, text_CD: torch.Tensor, paper: tuple) -> torch.Tensor:
    """The protocol of the paper as it is told, one window at a time; a class has one wording here."""
    short, scale, prob, area = paper
    window, (width, height) = model.config.vision.image_size, image.size
    factor = short * window / min(height, width)
    size = (round(height * factor), round(width * factor))
    pixels = functional.interpolate(
        torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float(), size, mode="bilinear", align_corners=False
    )
    pixels = normalize(pixels[0].round().to(torch.uint8))
    total, count = torch.zeros(len(text_CD), *size), torch.zeros(size)
    starts = [[min(n, length - window) for n in range(0, length - window // 2, window // 2)] for length in size]
    for top in starts[0]:
        for left in starts[1]:
            part = (slice(top, top + window), slice(left, left + window))
            patches = functional.normalize(
                model.encode_image_dense(pixels[None, :, part[0], part[1]], csa=True)[0], dim=-1
            )
            side = int(len(patches) ** 0.5)
            grid = (patches @ text_CD.T).T.reshape(1, -1, side, side)
            total[:, part[0], part[1]] += functional.interpolate(grid, (window, window), mode="bilinear")[0]
            count[part] += 1
    assert count.min() >= 1
    logits = functional.interpolate((total / count)[None], (height, width), mode="bilinear")[0]
    probability = (scale * logits).softmax(dim=0)
    if area:
        pixels_C = torch.bincount(probability.argmax(dim=0).flatten(), minlength=len(text_CD))
        small = pixels_C <= area * pixels_C[1:].sum()
        small[0] = False
        probability[small] = 0
    best = probability.max(dim=0)
    return torch.where(best.values < prob, 0, best.indices)


def mean_iou_of(pairs: Sequence[tuple[torch.Tensor, np.ndarray]], classes: int) -> tuple[float, float]:
    """Mean IoU over classes that are present or predicted, and the share of right pixels, in percent; by sets."""
    predicted = np.concatenate([labels.numpy().ravel() for labels, _ in pairs])
    truth = np.concatenate([map_HW.ravel() for _, map_HW in pairs])
    predicted, truth = predicted[truth != IGNORE], truth[truth != IGNORE]
    ious = [
        ((predicted == c) & (truth == c)).sum() / ((predicted == c) | (truth == c)).sum()
        for c in range(classes)
        if ((predicted == c) | (truth == c)).any()
    ]
    return 100 * float(np.mean(ious)), 100 * float((predicted == truth).mean())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and result file of all layouts, evaluated by one command with two templates."""
    folder = tmp_path_factory.mktemp("segmentation")
    write_run(folder / "run", tiny_config("demo", folder))
    given = []
    for name, layout in LAYOUTS.items():
        given += ["--benchmark", f"{name}={layout.write(folder / name)}"]
    arguments = ["run", "--checkpoint", str(folder / "run"), "--device", "cpu", "--out", str(folder / "r.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_map_files, "published_classes", lambda: {"imagenet": {"templates": TEMPLATES}})
        assert run_command(command, [*arguments, "--batch-size", "7", *given]) == 0
    return folder, json.loads((folder / "r.json").read_text())["benchmarks"]


@pytest.mark.parametrize("name", NAMES)
def test_every_set_is_evaluated_as_the_protocol_says(name: str, evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder, results = evaluated
    model, layout = load_checkpoint(folder / "run", "teacher"), LAYOUTS[name]
    result = results[name]
    names = open_set(name, folder / name).classes.classes  # type: ignore[attr-defined]
    with torch.no_grad():
        text_CD = text_features(model, names)
        images = [decode((folder / name / layout.images.format(one)).read_bytes()) for one in layout.ids]
        found = [classes_found(model, image, text_CD, PAPER[name]) for image in images]
    assert len({int(c) for labels in found for c in labels.unique()}) > 1
    pairs = [(labels, layout.truth(number)) for number, labels in enumerate(found)]
    # Windows in batches have other last bits: a pixel or two may go to a neighbour of theirs.
    miou, right = mean_iou_of(pairs, layout.classes)
    assert result["metrics"]["miou"] == pytest.approx(miou, abs=0.2)
    assert result["metrics"]["pixel_accuracy"] == pytest.approx(right, abs=0.2)
    assert result["chance"]["pixel_accuracy"] == pytest.approx(100 / layout.classes)
    protocol, (short, scale, prob, area) = result["protocol"], PAPER[name]
    assert (protocol["short_side_px"], protocol["window_px"], protocol["stride_px"]) == (16 * short, 16, 8)
    assert (protocol["scale"], protocol["prob_threshold"], protocol["area_threshold"]) == (scale, prob, area)
    assert (protocol["images"], protocol["classes"], protocol["prompts"]) == (3, layout.classes, 2 * layout.classes)
    assert protocol["ensemble"].endswith("of a class: its likeliest wording")


def test_forms_of_a_set_are_evaluated_alike(evaluated: tuple[Path, dict[str, Any]]) -> None:
    _, results = evaluated
    assert set(results) == set(LAYOUTS)
    for name, result in results.items():
        assert result["sha256"] == results[name.partition(":")[0]]["sha256"]
        assert result["split"] in ("val", "validation", "val2017")
        assert result["protocol"]["csa"] is True


def test_a_broken_map_ends_the_command_in_one_line_and_nothing_is_written(
    evaluated: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = LAYOUTS["voc20"]
    values = layout.values(1)
    values[3, 4] = 200
    (layout.write(tmp_path / "set") / layout.maps.format(layout.ids[1])).write_bytes(png(values))
    arguments = ["run", "--checkpoint", str(evaluated[0] / "run"), "--device", "cpu", "--out", str(tmp_path / "r.json")]
    assert run_command(command, [*arguments, "--benchmark", f"voc20={tmp_path / 'set'}"]) == 2
    error = capsys.readouterr().err
    assert "2007_000042.png is no map of classes (it holds the class number 200, not one of 0 to 20 and 255)" in error
    assert "Traceback" not in error
    assert not (tmp_path / "r.json").exists()


def test_patches_that_are_not_finite_are_refused(evaluated: tuple[Path, dict[str, Any]]) -> None:
    model, found = load_checkpoint(evaluated[0] / "run", "teacher"), fake_maps(Path())
    with torch.no_grad():
        model.visual.proj[0, 0] = float("nan")
    with pytest.raises(ValueError, match="features of patches hold NaN"):
        evaluate_set(model, found)


def test_a_protocol_of_ones_own(evaluated: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, results = evaluated
    changes = {
        "csa": ("csa=false",),
        "refined": ("pamr_steps=3",),
        "surer": ("prob_threshold=0.3",),
        "coarser": ("stride=1", "interpolation=bicubic", "short_side=1"),
    }
    templates = tmp_path / "templates.json"
    templates.write_text(json.dumps({"templates": TEMPLATES}))
    for name, texts in changes.items():
        given = ["--benchmark", f"context60={folder / 'context60'}", "--classes", str(templates)]
        given += [part for text in texts for part in ("--protocol", text)]
        arguments = ["run", "--checkpoint", str(folder / "run"), "--device", "cpu", "--out", str(tmp_path / name)]
        assert run_command(command, [*arguments, *given]) == 0
        found = json.loads((tmp_path / name).read_text())["benchmarks"]["context60"]
        assert found["metrics"]["pixel_accuracy"] != results["context60"]["metrics"]["pixel_accuracy"]
        kept, changed = results["context60"]["protocol"], found["protocol"]
        assert {text.partition("=")[0] for text in texts} <= {
            key.removesuffix("_px") for key in kept if kept[key] != changed[key]
        }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cas=false", "did you mean csa?"),
        ("csa", "give KEY=VALUE"),
        ("csa=1", "true or false"),
        ("prob_threshold=1", "a share from 0"),
        ("scale=.inf", "a number above 0"),
        ("short_side=0.5", "1 or more"),
        ("pamr_steps=1.5", "a whole number"),
        ("interpolation=[", "bilinear or bicubic"),
    ],
)
def test_a_protocol_that_is_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="--protocol ") as caught:
        parse([text])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_protocol_without_a_segmentation_set() -> None:
    with pytest.raises(ValueError, match="is for segmentation"):
        with_protocol({"fake": fake_classes(Path())}, ["csa=false"])


def test_thresholds_are_for_sets_with_a_background(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps({"templates": TEMPLATES}))
    bare = {name: open_set(name, LAYOUTS[name].write(tmp_path / name)) for name in ("voc20", "ade20k")}
    own = with_classes(open_set("voc21", LAYOUTS["voc21"].write(tmp_path / "voc21")), tmp_path / "names.json")
    for text in ("prob_threshold=0.2", "area_threshold=0.3"):
        with pytest.raises(UserError, match=rf"^--protocol {text}: no background in voc20, ade20k to") as caught:
            with_protocol({"voc21": own, "fake": fake_classes(Path()), **bare}, ["csa=false", text])
        assert "\n" not in str(caught.value)
        (found,) = with_protocol({"voc21": own}, [text]).values()
        assert found.protocol != own.protocol  # type: ignore[attr-defined]
    assert with_protocol(bare, ["prob_threshold=0"]) == bare


def test_classes_called_the_same_have_figures_of_their_own(evaluated: tuple[Path, dict[str, Any]]) -> None:
    model, found = load_checkpoint(evaluated[0] / "run", "teacher"), fake_maps(Path())
    names = ("cat", "cat", "cat (2)", "cat")
    plain = evaluate_set(model, found).metrics
    same = evaluate_set(model, replace(found, classes=replace(found.classes, classes=names))).metrics
    keys = ["iou_cat", "iou_cat (2)", "iou_cat (2) (2)", "iou_cat (3)"]
    assert [key for key in same if key.startswith("iou_")] == keys
    assert list(same.values()) == list(plain.values())


def test_the_digest_of_prompts_tells_wordings_from_classes() -> None:
    grouped = [
        class_protocol(fill_templates("x", classes, TEMPLATES), "")
        for classes in ({"a": ["cat", "pet"], "b": ["dog"]}, {"a": ["cat"], "b": ["pet", "dog"]})
    ]
    assert [one["prompts"] for one in grouped] == [6, 6]
    assert grouped[0]["prompts_sha256"] != grouped[1]["prompts_sha256"]
