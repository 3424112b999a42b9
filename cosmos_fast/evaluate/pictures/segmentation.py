"""Which class each pixel of an image is given, and which it has where that is known.

Axis legend: S wordings, D embed, H, W pixels.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import matplotlib.colors
import numpy as np
import torch
from PIL import Image

from cosmos_fast.evaluate.pictures import drawing
from cosmos_fast.evaluate.pictures.album import Sheet
from cosmos_fast.evaluate.pictures.sources import Source
from cosmos_fast.evaluate.pixels import segmentation_view
from cosmos_fast.evaluate.prompts import ClassSet, synonym_features
from cosmos_fast.evaluate.report.pictures import class_overlay, enlarge, jpeg
from cosmos_fast.evaluate.report.theme import CLASS_COLOURS
from cosmos_fast.evaluate.segmentation import IGNORE, SegmentationProtocol, segment
from cosmos_fast.evaluate.segmented_scenes import text_encoder
from cosmos_fast.evaluate.set_runs import check_finite
from cosmos_fast.model.cosmos import CosmosModel

SIDE = 400
BACKGROUND = "background"


@dataclass(frozen=True)
class Segmented:
    """panels: name and picture: the image, the truth where it is known, what the model says. legend: class and colour
    of what the panels show. agreement: share of the labelled pixels that are right, None without a truth."""

    key: str
    panels: list[tuple[str, bytes]]
    legend: list[tuple[str, str]]
    agreement: float | None


def class_colours(names: Sequence[str]) -> list[str]:
    """A hex colour a class: the one it is named after, grey for the background, else one that no other class has."""
    hues = ((0.13 + 0.618034 * number) % 1.0 for number in range(10**6))
    fresh = iter(CLASS_COLOURS)

    def another() -> str:
        colour = next(fresh, None)
        return colour or matplotlib.colors.to_hex(colorsys.hls_to_rgb(next(hues), 0.52, 0.62))

    taken: set[str] = set()
    found = []
    for name in names:
        named = matplotlib.colors.to_hex(name) if matplotlib.colors.is_color_like(name) else None
        colour = "#8b91a3" if name == BACKGROUND else named if named and named not in taken else another()
        while colour in taken and name != BACKGROUND:
            colour = another()
        taken.add(colour)
        found.append(colour)
    return found


@torch.inference_mode()
def segmentation_sheets(
    model: CosmosModel,
    source: Source,
    numbers: Sequence[int],
    classes: ClassSet,
    protocol: SegmentationProtocol,
    on_sheet: Callable[[], None] = lambda: None,
) -> Iterator[Sheet]:
    """A sheet an image: the image, its true classes if the source has them, and the model's.

    classes: to choose among; those of the source's truth where it has one.
    """
    text_SD, class_S = synonym_features(model, classes, text_encoder(model))
    check_finite(text_SD)
    window = model.config.vision.image_size
    colours = class_colours(classes.classes)
    for number in numbers:
        image = source.images.image(number)
        view_3HW = segmentation_view(image, window, protocol, source.images.key(number))
        views = [(view_3HW, (image.height, image.width))]
        found = segment(model, views, text_SD, [class_S], window=window, csa=protocol.csa, protocol=protocol)
        (maps,) = islice(found, 1)
        truth = source.segmentation.truth(number) if source.segmentation else None
        yield _sheet(source.images.key(number), image, maps[0].numpy(), truth, classes.classes, colours)
        on_sheet()


def _sheet(
    key: str,
    image: Image.Image,
    said_HW: np.ndarray,
    true_HW: np.ndarray | None,
    names: Sequence[str],
    colours: Sequence[str],
) -> Sheet:
    panels = [("image", enlarge(image, SIDE))]
    agreement = None
    if true_HW is not None:
        panels.append(("truth", _overlay(image, true_HW, names, colours)))
        labelled = true_HW != IGNORE
        agreement = float((said_HW == true_HW)[labelled].mean()) if labelled.any() else None
    panels.append(("predicted", _overlay(image, said_HW, names, colours)))
    present = {int(c) for labels in (said_HW, true_HW) if labels is not None for c in np.unique(labels)} - {IGNORE}
    legend = [(names[c], colours[c]) for c in sorted(present)]
    below = (
        {} if agreement is None else {"predicted": f"predicted, {100 * agreement:.0f} % of the labelled pixels right"}
    )
    drawn = [
        drawing.stacked([picture, drawing.text_block(below.get(name, name), picture.width, colour=drawing.FAINT)])
        for name, picture in panels
    ]
    row = drawing.rows(drawn, across=len(drawn))
    sheet = drawing.titled(
        key, [row, drawing.legend([name for name, _ in legend], [colour for _, colour in legend], row.width)]
    )
    numbers = {
        "pixels": [image.width, image.height],
        "predicted": _shares(said_HW, names),
        "truth": None if true_HW is None else _shares(true_HW, names),
        "pixels_right": None if agreement is None else round(agreement, 6),
    }
    shown = Segmented(key, [(name, jpeg(picture)) for name, picture in panels], legend, agreement)
    return Sheet(key, sheet, shown, numbers)


def _overlay(image: Image.Image, labels_HW: np.ndarray, names: Sequence[str], colours: Sequence[str]) -> Image.Image:
    """Classes in their colours; the background and what has no label stay grey."""
    painted = np.where(labels_HW == IGNORE, 0, labels_HW.astype(np.int64) + 1)
    if names[0] == BACKGROUND:
        painted[painted == 1] = 0
    return class_overlay(image, painted, colours, SIDE)


def _shares(labels_HW: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Class -> share of all pixels, of those that occur; the rest has no label."""
    counts = np.bincount(labels_HW.ravel(), minlength=256)
    return {name: round(float(counts[c]) / labels_HW.size, 6) for c, name in enumerate(names) if counts[c]}
