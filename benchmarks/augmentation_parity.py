"""How far the loaders' pixels are from PIL's, operation by operation: `python -m benchmarks.augmentation_parity`.

Prints the table of docs/augmentation.md, which a test holds to what is measured. Errors are in 8-bit levels, on
pictures with the spectrum of photographs. "On a CPU": what both loaders make there, which is the same. "As on a GPU":
what the DALI loader runs there, DALI's graph that decodes and cuts and the colours in torch, here by their CPU
operators.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks import original_input
from benchmarks.input_shards import jpeg, picture
from cosmos_fast.config import ViewsConfig
from cosmos_fast.data import dali_pipeline, encoded, rng
from cosmos_fast.data.augment import ViewNumbers, draw_views
from cosmos_fast.data.images import crop_and_resize, decode, to_pixels
from cosmos_fast.data.recolor import color_numbers, recolor_

WIDTH, HEIGHT, SIZE = 500, 375, 224
PICTURES = 2
PLAIN = ViewNumbers(
    box=(0, 0, SIZE, SIZE), size=SIZE, flip=False, jitter=(), gray=False, blur_radius=0.0, solarize_threshold=None
)
COLOURS: dict[str, list[ViewNumbers]] = {
    "flip": [replace(PLAIN, flip=True)],
    "brightness 0.6 to 1.4": [replace(PLAIN, jitter=(("brightness", factor),)) for factor in (0.6, 0.83, 1.17, 1.4)],
    "contrast 0.6 to 1.4": [replace(PLAIN, jitter=(("contrast", factor),)) for factor in (0.6, 0.83, 1.17, 1.4)],
    "saturation 0.8 to 1.2": [replace(PLAIN, jitter=(("saturation", factor),)) for factor in (0.8, 0.93, 1.07, 1.2)],
    "hue -0.1 to 0.1": [replace(PLAIN, jitter=(("hue", turns),)) for turns in (-0.1, -0.04, 0.04, 0.1)],
    "greyscale": [replace(PLAIN, gray=True)],
    "blur, radius 0.1 to 2": [replace(PLAIN, blur_radius=radius) for radius in (0.13, 0.53, 0.97, 1.46, 1.93)],
    "solarise at 128": [replace(PLAIN, solarize_threshold=128)],
}
CUTS = {
    "cut to 224, twice as large": [replace(PLAIN, box=(20, 10, 468, 370))],
    "cut to 224, half as large": [replace(PLAIN, box=(101, 53, 213, 165))],
    "cut to 96, a twentieth of the area": [replace(PLAIN, box=(307, 200, 404, 297), size=96)],
    "cut to 96, a half of the area": [replace(PLAIN, box=(3, 40, 433, 260), size=96)],
}
FILES: dict[str, Callable[[Image.Image], bytes]] = {
    "decode, JPEG, colours at half the resolution": jpeg,
    "decode, JPEG, colours in full": lambda image: jpeg(image, subsampling=0),
    "decode, JPEG, progressive": lambda image: jpeg(image, progressive=True),
    "decode, JPEG, grey": lambda image: jpeg(image.convert("L")),
}
VIEWS = "all of it, as drawn for training"


class Error(NamedTuple):
    """Mean and largest difference to PIL, levels of 255."""

    mean: float
    most: int


class Case(NamedTuple):
    """One line of the table. gpu: None where it takes DALI and that is not installed."""

    operation: str
    cpu: Error
    gpu: Error | None


def cases() -> Iterator[Case]:
    """Every operation."""
    with_dali = dali_pipeline.why_unusable("cpu") is None
    pictures = [picture(WIDTH, HEIGHT, seed=seed) for seed in range(PICTURES)]
    for operation, encode in FILES.items():
        yield _decoding(operation, [encode(image.crop((0, 0, SIZE, SIZE))) for image in pictures], with_dali)
    for operation, views in CUTS.items():
        yield _cutting(operation, pictures, views, with_dali)
    for operation, views in COLOURS.items():
        crops = [image.crop((40, 30, 40 + SIZE, 30 + SIZE)) for image in pictures]
        yield Case(operation, *(_recolouring(crops, views, backend) for backend in ("auto", "eager")))
    yield _all(pictures, with_dali)


def _decoding(operation: str, files: Sequence[bytes], with_dali: bool) -> Case:
    """A box of the whole picture at its own size is not resized."""
    expected = [pixels_of(original_input.decode(file)) for file in files]
    ours = [to_pixels(decode(file)) for file in files]
    dali = dali_cuts(files, [[PLAIN]] * len(files)) if with_dali else None
    return Case(operation, error_of(ours, expected), error_of(dali, expected) if dali else None)


def _cutting(operation: str, pictures: Sequence[Image.Image], views: list[ViewNumbers], with_dali: bool) -> Case:
    expected = [pixels_of(original_input.cut(image, view)) for image in pictures for view in views]
    ours = [crop_and_resize(to_pixels(image), view) for image in pictures for view in views]
    files = [_ppm(image) for image in pictures]  # decoded without loss
    dali = dali_cuts(files, [views] * len(files)) if with_dali else None
    return Case(operation, error_of(ours, expected), error_of(dali, expected) if dali else None)


def _recolouring(crops: Sequence[Image.Image], views: Sequence[ViewNumbers], backend: str) -> Error:
    expected = [pixels_of(original_input.recolor(image, view)) for image in crops for view in views]
    ours = [_recolored(to_pixels(image), view, backend) for image in crops for view in views]
    return error_of(ours, expected)


def _all(pictures: Sequence[Image.Image], with_dali: bool) -> Case:
    """JPEG to the eight views of training."""
    files = [jpeg(image) for image in pictures]
    crops = ViewsConfig().crops(SIZE)
    drawn = [draw_views(crops, WIDTH, HEIGHT, rng.generator(0, rng.CROPS, item=item)) for item in range(len(files))]
    pairs = [(file, view) for file, views in zip(files, drawn, strict=True) for view in views]
    decoded = {file: (original_input.decode(file), to_pixels(decode(file))) for file in files}
    expected = [pixels_of(original_input.recolor(original_input.cut(decoded[f][0], view), view)) for f, view in pairs]
    ours = [_recolored(crop_and_resize(decoded[file][1], view), view) for file, view in pairs]
    dali = None
    if with_dali:
        cut = dali_cuts(files, drawn)
        dali = [_recolored(pixels, view, "eager") for pixels, (_, view) in zip(cut, pairs, strict=True)]
    return Case(VIEWS, error_of(ours, expected), error_of(dali, expected) if dali else None)


def pixels_of(image: Image.Image) -> torch.Tensor:
    """uint8 [3, H, W]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _recolored(pixels: torch.Tensor, view: ViewNumbers, backend: str = "auto") -> torch.Tensor:
    crops = pixels[None].clone(memory_format=torch.contiguous_format)
    return recolor_(crops, color_numbers([view]), backend=backend)[0]


def dali_cuts(files: Sequence[bytes], views: Sequence[Sequence[ViewNumbers]]) -> list[torch.Tensor]:
    """The views of each file, decoded and cut by DALI: files one after the other, uint8 [3, size, size] a view."""
    like = ViewsConfig().crops(SIZE)[0]
    sizes = [replace(like, size=view.size) for view in views[0]]
    cpu = torch.device("cpu")
    pipeline = dali_pipeline.DaliPipeline(sizes, len(files), cpu, threads=1, depth=1, dali_cuts=True)
    images = encoded.pack(list(range(len(files))), files, views, [(0, 0)] * len(files))
    pipeline.submit(images)
    by_view = [view.clone() for view in pipeline.collect()]
    pipeline.close()
    return [view[row] for row in range(len(files)) for view in by_view]


def _ppm(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PPM")
    return out.getvalue()


def error_of(ours: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> Error:
    """Every picture counts alike, whatever its size."""
    differences = [(a.int() - b.int()).abs() for a, b in zip(ours, expected, strict=True)]
    mean = sum(d.float().mean().item() for d in differences) / len(differences)
    return Error(mean, max(int(d.max()) for d in differences))


def line(case: Case) -> str:
    """As it stands in the table."""
    cells = [f"{error.mean:.3f} | {error.most}" if error else "- | -" for error in (case.cpu, case.gpu)]
    return f"| {case.operation} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    print("| operation | on a CPU, mean | largest | as on a GPU, mean | largest |\n|---|---|---|---|---|")
    for case in cases():
        print(line(case))


if __name__ == "__main__":
    main()
