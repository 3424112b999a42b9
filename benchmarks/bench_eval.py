"""Evaluation: encoding from files against the towers alone, retrieval metrics, windows and class texts.

`image_ms`, `caption_ms`: a folder of JPEGs with captions beside them, read as `eval run --benchmark captions=` does,
against the towers alone on tensors that lie ready in memory. `retrieval_ms`: ranks of both directions in blocks,
against the whole matrix of scores, sorted. `segmentation_ms`: windows of several images in a forward and only the
nearest class sought, against image by image with the probabilities of all classes. `class_texts_ms`: prompts of all
classes together at their own lengths, against the eager port class by class.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import parts, rows
from benchmarks.eager_cosmos import EagerConfig, EagerCosmos
from benchmarks.eval_parts import (
    NAMES,
    TEMPLATES,
    ClassTexts,
    Gallery,
    Pairs,
    Scene,
    Segmented,
    metrics_by_sorting,
    metrics_in_blocks,
    run_gallery,
    write_pairs,
)
from benchmarks.harness import MIN_REPEATS, Timing, interleave
from benchmarks.memory import peak_mib
from benchmarks.rows import Row
from benchmarks.shapes import VIT_B_16
from cosmos_fast import create_model
from cosmos_fast.cli.main import run
from cosmos_fast.utils.errors import UserError

ENCODING_BAR = 1 / 0.9  # 90 % of the towers' throughput
RETRIEVAL_BAR, RETRIEVAL_MEMORY_BAR = 1 / 3, 0.1
SEGMENTATION_BAR, CLASS_TEXTS_BAR = 1.0, 0.5
READY, SORTED = "towers alone on tensors in memory", "whole matrix, sorted"
IMAGE_BY_IMAGE, CLASS_BY_CLASS = "image by image, all probabilities", "class by class, padded, eager port"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured.

    images: encoded, in batches of `batch`, of `image_px` pixels (width, height), with `captions` each. gallery: images
    and captions of the retrieval metrics. scenes: images segmented, `window_batch` windows a forward, into `classes`.
    layers: blocks of the towers that segment and that encode class texts. prompted: classes of 80 prompts each.
    """

    device: str
    model: EagerConfig = VIT_B_16
    images: int
    batch: int
    image_px: tuple[int, int] = (500, 375)
    captions: int = 5
    gallery: tuple[int, int] = (5_000, 25_000)
    scenes: int
    classes: int = 150
    window_batch: int
    layers: int
    prompted: int

    def few_blocks(self) -> EagerConfig:
        return replace(self.model, vision_layers=self.layers, text_layers=self.layers)

    def row(self, metric: str, value: float, unit: str, *, shapes: dict[str, object], **more: Any) -> Row:
        device = rows.device_name(self.device)
        return Row(name="eval", device=device, shapes=shapes, metric=metric, value=value, unit=unit, **more)


SETTINGS = {
    "cpu": Setting(device="cpu", images=6, batch=2, scenes=2, window_batch=12, layers=2, prompted=2),
    "cuda": Setting(device="cuda", images=1024, batch=128, scenes=64, window_batch=256, layers=12, prompted=90),
}
TINY_MODEL = replace(
    VIT_B_16, embed_dim=16, image_size=32, vision_width=64, vision_layers=1, text_width=64, text_heads=1, text_layers=1
)


def tiny(device: str) -> Setting:
    """Every part, in little: for tests and rehearsals."""
    small = replace(SETTINGS["cpu"], device=device, model=TINY_MODEL, images=3, image_px=(40, 30), captions=2)
    return replace(small, gallery=(60, 300), scenes=3, classes=5, layers=1)


def told(setting: Setting, name: str, each: int, timing: Timing, **asked: Any) -> Iterator[Row]:
    """A figure of one of `each`, and of what it is compared with."""
    shapes = asked.pop("shapes")
    asked["ratio"] = timing.ratio
    yield setting.row(f"{name}/baseline", timing.baseline_median_ms / each, "ms", shapes=shapes)
    yield setting.row(name, timing.candidate_median_ms / each, "ms", shapes=shapes, **asked)


def measure_encoding(setting: Setting, repeats: int) -> Iterator[Row]:
    torch.manual_seed(0)
    model = create_model(setting.model.to_openclip()).to(setting.device).eval()
    shapes: dict[str, object] = {
        "images": setting.images,
        "captions": setting.images * setting.captions,
        "batch": setting.batch,
        "image_px": list(setting.image_px),
        "crop_px": setting.model.image_size,
        "vision": [setting.model.vision_width, setting.model.vision_layers],
        "text": [setting.model.text_width, setting.model.text_layers],
    }
    with tempfile.TemporaryDirectory(prefix="bench-eval-") as folder:
        write_pairs(Path(folder), setting.images, setting.captions, *setting.image_px)
        pairs = Pairs(model, Path(folder), setting.batch)
        for name, count, ready, evaluated in (
            ("image_ms", len(pairs.found.images), pairs.images_ready, pairs.images_evaluated),
            ("caption_ms", len(pairs.texts), pairs.captions_ready, pairs.captions_evaluated),
        ):
            timing = interleave(
                ready, evaluated, int, check=pairs.check, device=setting.device, repeats=repeats, warmup=1
            )
            yield from told(setting, name, count, timing, baseline=READY, bar=ENCODING_BAR, shapes=shapes)


def measure_retrieval(setting: Setting, repeats: int) -> Iterator[Row]:
    images, captions = setting.gallery
    dim, device = setting.model.embed_dim, setting.device
    shapes: dict[str, object] = {"images": images, "captions": captions, "embed_dim": dim}

    def check() -> None:
        gallery = Gallery.made(max(1, images // 10), captions // 10, dim, 1, device).double()
        ours, theirs = metrics_in_blocks(gallery), metrics_by_sorting(gallery)
        assert ours == theirs, f"other metrics: {ours}, {theirs}"

    made = partial(Gallery.made, images, captions, dim, device=device)
    timing = interleave(
        metrics_by_sorting, metrics_in_blocks, made, check=check, device=device, repeats=repeats, warmup=0
    )
    yield from told(setting, "retrieval_ms", 1, timing, baseline=SORTED, bar=RETRIEVAL_BAR, shapes=shapes)
    theirs, ours = (
        peak_mib(
            partial(run_gallery, metrics, images, captions, dim, device),
            device=device,
            settle=partial(run_gallery, metrics, 10, 50, dim, device),
        )
        for metrics in (metrics_by_sorting, metrics_in_blocks)
    )
    yield setting.row("retrieval_peak_mib/baseline", theirs, "MiB", shapes=shapes)
    asked: dict[str, Any] = {"baseline": SORTED, "ratio": ours / max(theirs, 1e-3), "bar": RETRIEVAL_MEMORY_BAR}
    yield setting.row("retrieval_peak_mib", ours, "MiB", shapes=shapes, **asked)


def measure_segmentation(setting: Setting, repeats: int) -> Iterator[Row]:
    torch.manual_seed(0)
    config = setting.few_blocks()
    model = create_model(config.to_openclip()).to(setting.device).eval()
    text_SD = torch.nn.functional.normalize(
        torch.randn(setting.classes, config.embed_dim, device=setting.device), dim=1
    )
    segmented = Segmented(model, text_SD, setting.window_batch)
    short, long = round(1.5 * config.image_size), 2 * config.image_size

    def scenes(seed: int) -> list[Scene]:
        """Landscape and portrait, already at the protocol's short side."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [(short, long), (long, short)] * setting.scenes
        return [(torch.randn(3, *shape, generator=generator), shape) for shape in shapes[: setting.scenes]]

    shapes: dict[str, object] = {
        "images": setting.scenes,
        "image_px": [long, short],
        "window_px": config.image_size,
        "batch": setting.window_batch,
        "classes": setting.classes,
        "vision": [config.vision_width, config.vision_layers],
    }
    timing = interleave(
        segmented.image_by_image,
        segmented.across_images,
        scenes,
        check=lambda: segmented.check(scenes(99)),
        device=setting.device,
        repeats=repeats,
        warmup=1,
    )
    asked: dict[str, Any] = {"baseline": IMAGE_BY_IMAGE, "bar": SEGMENTATION_BAR, "shapes": shapes}
    yield from told(setting, "segmentation_ms", setting.scenes, timing, **asked)


def measure_class_texts(setting: Setting, repeats: int) -> Iterator[Row]:
    torch.manual_seed(0)
    config = setting.few_blocks()
    port = EagerCosmos(config)
    model = create_model(config.to_openclip())
    model.load_reference_state_dict(port.state_dict())
    names = NAMES[: setting.prompted]
    texts = ClassTexts(model.to(setting.device).eval(), port.to(setting.device).eval(), names, TEMPLATES)
    timing = interleave(
        texts.class_by_class,
        texts.together,
        int,
        check=texts.check,
        device=setting.device,
        repeats=repeats,
        warmup=1,
    )
    shapes: dict[str, object] = {
        "classes": len(names),
        "templates": len(TEMPLATES),
        "text": [config.text_width, config.text_layers],
        "context_length": config.context_length,
    }
    asked: dict[str, Any] = {"baseline": CLASS_BY_CLASS, "bar": CLASS_TEXTS_BAR, "shapes": shapes}
    yield from told(setting, "class_texts_ms", len(names), timing, **asked)


@click.command(name="eval", help=__doc__, context_settings={"show_default": True})
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where the model runs.")
@click.option("--images", type=click.IntRange(1), help="Images encoded; default: 6 on a CPU, 1024 on a GPU.")
@click.option("--repeats", type=click.IntRange(MIN_REPEATS), default=MIN_REPEATS, help="Timed repetitions.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; default: results folder.")
def command(device: str, images: int | None, repeats: int, out: Path | None) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here, use cpu")
    setting = SETTINGS[device]
    if images is not None:
        setting = replace(setting, images=images)
    planned = [
        ("encoding", partial(measure_encoding, setting, repeats)),
        ("retrieval", partial(measure_retrieval, setting, repeats)),
        ("segmentation", partial(measure_segmentation, setting, repeats)),
        ("class texts", partial(measure_class_texts, setting, repeats)),
    ]
    parts.measure(planned, out)


if __name__ == "__main__":
    sys.exit(run(command, name="bench eval"))
