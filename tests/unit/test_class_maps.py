"""From cosines to classes: thresholds, strips and refinement, each against its formula written out pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from cosmos_fast.evaluate import class_maps, pamr
from cosmos_fast.evaluate.segmentation import SegmentationProtocol, input_shape, segment

OWNER = (0, 0, 1, -1, 2, 2, 3)  # the class of each wording


def cosines(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(height, width, len(OWNER), generator=generator)


def classes_of_probabilities(cosine_HWS: torch.Tensor, protocol: SegmentationProtocol) -> list[list[int]]:
    """Softmax, maximum over synonyms, small classes set to zero, argmax, background where unsure; in plain loops."""
    height, width, _ = cosine_HWS.shape
    used = [s for s, owner in enumerate(OWNER) if owner >= 0]
    table: dict[tuple[int, int], list[float]] = {}
    for y in range(height):
        for x in range(width):
            weights = {s: math.exp(protocol.scale * cosine_HWS[y, x, s].item()) for s in used}
            total = sum(weights.values())
            table[y, x] = [max(weights[s] / total for s in used if OWNER[s] == c) for c in range(4)]
    area = [0] * 4
    for row in table.values():
        area[row.index(max(row))] += 1
    found = [[0] * width for _ in range(height)]
    for (y, x), row in table.items():
        if protocol.area_threshold:
            row = [p * (c == 0 or area[c] > protocol.area_threshold * sum(area[1:])) for c, p in enumerate(row)]
        best = row.index(max(row))
        found[y][x] = 0 if row[best] < protocol.prob_threshold else best
    return found


@pytest.mark.parametrize(("prob", "area"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.2), (0.5, 0.2), (0.0, 0.99)])
def test_thresholds_equal_the_probabilities_written_out(prob: float, area: float) -> None:
    cosine_HWS = cosines(12, 9)
    cosine_HWS[..., 6] -= 0.08  # a class of few pixels
    protocol = SegmentationProtocol(scale=20.0, prob_threshold=prob, area_threshold=area)
    labels = class_maps.label_map(cosine_HWS, torch.tensor(OWNER), (12, 9), protocol)
    assert labels.tolist() == classes_of_probabilities(cosine_HWS, protocol)
    kept = {c for row in labels.tolist() for c in row}
    assert kept == ({0} if area == 0.99 else {0, 1, 2} if area else {0, 1, 2, 3})


@pytest.mark.parametrize(
    ("small", "large"), [((5, 7), (23, 31)), ((23, 8), (9, 5)), ((1, 1), (4, 3)), ((6, 6), (6, 6))]
)
def test_rows_of_an_enlarged_map_are_those_of_the_whole(small: tuple[int, int], large: tuple[int, int]) -> None:
    map_hwS = cosines(*small)
    whole = functional.interpolate(map_hwS.permute(2, 0, 1)[None], large, mode="bilinear")[0].permute(1, 2, 0)
    assert torch.allclose(class_maps.enlarge(map_hwS, large), whole)
    for start, stop in ((0, 1), (1, large[0] - 1), (large[0] - 1, large[0]), (0, large[0])):
        rows = class_maps.enlarged_rows(map_hwS, large, start, stop)
        assert torch.allclose(rows, whole[start:stop], atol=1e-6)


@pytest.mark.parametrize(("prob", "area"), [(0.0, 0.0), (0.3, 0.1)])
def test_an_image_in_strips_has_the_classes_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, prob: float, area: float
) -> None:
    protocol = SegmentationProtocol(scale=20.0, prob_threshold=prob, area_threshold=area)
    map_hwS, shape = cosines(11, 6, seed=2), (41, 29)
    map_hwS[..., 6] -= 0.08
    whole = class_maps.label_map(map_hwS, torch.tensor(OWNER), shape, protocol)
    rows: list[int] = []
    kept = class_maps.enlarged_rows
    monkeypatch.setattr(class_maps, "STRIP_ELEMENTS", 4 * 29 * len(OWNER))
    monkeypatch.setattr(class_maps, "enlarged_rows", lambda *args: rows.append(args[3] - args[2]) or kept(*args))
    strips = class_maps.label_map(map_hwS, torch.tensor(OWNER), shape, protocol)
    assert max(rows) == 4
    assert strips.shape == shape
    assert (strips != whole).float().mean() < 0.005  # the last bits of an interpolation may decide a draw
    assert len(torch.unique(whole)) > 2


def refined_by_hand(maps: torch.Tensor, image: torch.Tensor, steps: int, dilations: tuple[int, ...]) -> torch.Tensor:
    """The formula of `pamr`, in float64, one pixel at a time; maps [H, W, S], image [3, H, W]."""
    height, width, _ = maps.shape
    maps, image = maps.double(), image.double()

    def places(y: int, x: int) -> list[tuple[int, int]]:
        around = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        return [
            (min(max(y + d * i, 0), height - 1), min(max(x + d * j, 0), width - 1))
            for d in dilations
            for i, j in around
        ]

    weights = {}
    for y in range(height):
        for x in range(width):
            others = [place for n, place in enumerate(places(y, x)) if n % 9 != 4]
            spread = torch.stack([image[:, i, j] for i, j in places(y, x)]).std(dim=0)
            apart = [((image[:, y, x] - image[:, i, j]).abs() / (0.1 * spread + 1e-8)).mean() for i, j in others]
            weights[y, x] = (others, (-torch.stack(apart)).softmax(dim=0))
    for _ in range(steps):
        new = torch.zeros_like(maps)
        for (y, x), (others, weight) in weights.items():
            new[y, x] = sum(w * maps[i, j] for w, (i, j) in zip(weight, others, strict=True))
        maps = new
    return maps


@pytest.mark.parametrize("dilations", [(1,), (2, 5)])
def test_refinement_equals_its_formula(monkeypatch: pytest.MonkeyPatch, dilations: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(3, 6, 7, generator=generator)
    image[:, :3, :2] = 0.25  # a plain corner: no deviation there at the first distance
    maps = torch.rand(6, 7, 3, generator=generator)
    expected = refined_by_hand(maps, image, 2, dilations)
    assert torch.allclose(pamr.refine(maps, image, 2, dilations).double(), expected, atol=1e-5)
    monkeypatch.setattr(pamr, "GROUP_ELEMENTS", 1)  # maps one by one
    assert torch.allclose(pamr.refine(maps, image, 2, dilations).double(), expected, atol=1e-5)


class Halves(nn.Module):
    """A patch says what its mean brightness is, a window of 8 px has 2 x 2 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(2))

    def encode_image_dense(self, images: torch.Tensor, csa: bool = False) -> torch.Tensor:
        bright = functional.avg_pool2d(images.mean(dim=1, keepdim=True), 4).flatten(1)[..., None]
        return torch.cat([bright, 1 - bright], dim=-1)


def test_refinement_moves_borders_to_the_edges_of_the_image() -> None:
    pixels = torch.zeros(3, 24, 24)
    pixels[:, :, :9] = 1.0  # the edge lies within a patch
    image = (pixels, (24, 24))
    found = {}
    for steps in (0, 10):
        protocol = SegmentationProtocol(pamr_steps=steps, pamr_dilations=(1, 2))
        args = {"window": 8, "csa": False, "protocol": protocol}
        ((labels,),) = segment(Halves(), [image], torch.eye(2), [torch.arange(2)], **args)
        found[steps] = (labels != (pixels[0] < 0.5)).sum().item()
    assert found[10] < found[0]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((375, 500), (336, 448)),  # the short side decides
        ((300, 2400), (256, 2048)),  # the long side does
        ((100, 2000), (224, 4480)),  # never below a window
        ((1024, 2048), (336, 672)),
    ],
)
def test_images_are_resized_to_the_short_side_unless_they_get_too_long(
    shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert input_shape(*shape, 224, SegmentationProtocol(long_side=2048 / 224)) == expected
