"""What a synthetic scene contains, as a pure function of (seed, split, index).

A *composition* is the sorted tuple of a scene's (shape, colour) pairs, all distinct. Its hash with the data-set seed
says which split it belongs to, so no composition can occur in both splits. Held-out compositions are distinct from each
other too, so that retrieval among held-out scenes has one right answer.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cosmos_fast.data.synthetic.vocabulary import BACKGROUNDS, CLASHES, COLOURS, PLACES, SHAPES, SIZES, TEXTURES
from cosmos_fast.utils.errors import UserError

SPLITS = ("train", "heldout")
HELDOUT_SHARE = 0.2  # of all compositions
# Purposes of random streams: a change of the captions must not change the pictures.
COMPOSITION, LAYOUT, RENDER, CAPTIONS = range(4)

Composition = tuple[tuple[str, str], ...]

_PAIRS = tuple(itertools.product(SHAPES, COLOURS))
_MAX_DRAWS = 5000
_MAX_ASPECT = 1.4
_MIN_ROOM = 0.9  # distance of two centres over the sum of the radii; below 1 they may overlap


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """What decides the content of a data set. Sides in pixels."""

    seed: int = 0
    min_objects: int = 2
    max_objects: int = 6
    min_side: int = 96
    max_side: int = 192

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}: give a number from 0 to 2^63 - 1")
        if not 1 <= self.min_objects <= self.max_objects <= len(PLACES):
            raise UserError(
                f"{self.min_objects} to {self.max_objects} objects a scene: give 1 <= min <= max <= {len(PLACES)}"
            )
        if not 48 <= self.min_side <= self.max_side <= 512:
            raise UserError(f"image sides {self.min_side}-{self.max_side} px: give 48 <= lowest <= highest <= 512")


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object; centre and radius in pixels, angle in radians. `instance` is its value in the mask."""

    shape: str
    colour: str
    size: str
    texture: str
    place: str
    x: float
    y: float
    radius: float
    angle: float
    instance: int


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A scene before it is drawn. Objects stand in drawing order: a later one may hide part of an earlier one."""

    split: str
    index: int
    width: int
    height: int
    background: str
    quality: int  # of the JPEG file, 1-100
    objects: tuple[SceneObject, ...]

    @property
    def key(self) -> str:
        """Unique over the data set, and independent of its size."""
        return f"{self.split}_{self.index:07d}"

    @property
    def composition(self) -> Composition:
        return tuple(sorted((o.shape, o.colour) for o in self.objects))


def stream(settings: SceneSettings, split: str, index: int, purpose: int, attempt: int = 0) -> np.random.Generator:
    """Random numbers that depend on the arguments only (Philox, counter-based)."""
    key = np.array([settings.seed, SPLITS.index(split) * 16 + purpose], dtype=np.uint64)
    counter = np.array([0, 0, attempt, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def split_of(composition: Composition, seed: int) -> str:
    """The split a composition belongs to: a hash, nothing else."""
    text = f"{seed}:" + ",".join(f"{shape}/{colour}" for shape, colour in composition)
    draw = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
    return "heldout" if draw < HELDOUT_SHARE else "train"


def compositions(settings: SceneSettings, split: str, start: int, stop: int) -> Iterator[Composition]:
    """Compositions of scenes start..stop-1. Held-out ones are distinct, which takes replaying those before `start`."""
    seen: set[Composition] = set()
    for index in range(start if split == "train" else 0, stop):
        for attempt in range(_MAX_DRAWS):
            candidate = _draw_composition(settings, split, index, attempt)
            if split_of(candidate, settings.seed) == split and candidate not in seen:
                break
        else:
            raise UserError(
                f"no more than {index} distinct {split} compositions found with {settings.min_objects} to "
                f"{settings.max_objects} objects: ask for fewer {split} scenes, or allow more objects"
            )
        if split == "heldout":
            seen.add(candidate)
        if index >= start:
            yield candidate


def scenes(settings: SceneSettings, split: str, start: int, stop: int) -> Iterator[Scene]:
    """Scenes start..stop-1 of a split."""
    for index, composition in enumerate(compositions(settings, split, start, stop), start):
        yield _lay_out(settings, split, index, composition)


def _draw_composition(settings: SceneSettings, split: str, index: int, attempt: int) -> Composition:
    rng = stream(settings, split, index, COMPOSITION, attempt)
    count = int(rng.integers(settings.min_objects, settings.max_objects + 1))
    return tuple(sorted(_PAIRS[i] for i in rng.choice(len(_PAIRS), count, replace=False)))


def _lay_out(settings: SceneSettings, split: str, index: int, composition: Composition) -> Scene:
    rng = stream(settings, split, index, LAYOUT)
    width, height = _draw_sides(rng, settings)
    colours = {colour for _, colour in composition}
    backgrounds = [b for b in BACKGROUNDS if not colours & CLASHES.get(b, frozenset())]
    background = backgrounds[int(rng.integers(len(backgrounds)))]
    quality = int(rng.integers(80, 96))
    placed: list[SceneObject] = []
    pairs = [composition[i] for i in rng.permutation(len(composition))]
    cells = [list(PLACES)[i] for i in rng.permutation(len(PLACES))]
    for instance, (shape, colour) in enumerate(pairs, 1):
        placed.append(_place(rng, (width, height), placed, cells, shape, colour, instance))
    return Scene(
        split=split,
        index=index,
        width=width,
        height=height,
        background=background,
        quality=quality,
        objects=tuple(placed),
    )


def _draw_sides(rng: np.random.Generator, settings: SceneSettings) -> tuple[int, int]:
    """Width and height. Aspect ratios stay below 1.4: beyond the central square there is background only."""
    aspect = math.exp(rng.uniform(0, math.log(min(_MAX_ASPECT, settings.max_side / settings.min_side))))
    short = rng.uniform(settings.min_side, settings.max_side / aspect)
    sides = (round(short * aspect), round(short))
    clipped = (min(max(sides[0], settings.min_side), settings.max_side), max(sides[1], settings.min_side))
    return clipped if rng.random() < 0.5 else (clipped[1], clipped[0])


def _place(
    rng: np.random.Generator,
    sides: tuple[int, int],
    placed: list[SceneObject],
    cells: list[str],
    shape: str,
    colour: str,
    instance: int,
) -> SceneObject:
    """Give an object a free cell (taken from `cells`) and a size with which it covers others little or not at all."""
    sizes = [list(SIZES)[i] for i in rng.permutation(len(SIZES))]
    if sizes[-1] != "small":  # small again at the end: what fits where nothing else does
        sizes.append("small")
    texture = TEXTURES[int(rng.integers(len(TEXTURES)))]
    angle = float(rng.uniform(-0.3, 0.3))
    best, best_room = None, -1.0
    for size, cell in itertools.product(sizes, cells[:4]):
        radius = min(sides) * float(rng.uniform(*SIZES[size])) / 2
        x, y = _position(rng, sides, PLACES[cell], radius)
        room = min((math.hypot(x - o.x, y - o.y) / (radius + o.radius) for o in placed), default=math.inf)
        if room > best_room:
            best_room = room
            best = SceneObject(
                shape=shape, colour=colour, size=size, texture=texture, place=cell,
                x=x, y=y, radius=radius, angle=angle, instance=instance,
            )  # fmt: skip
        if room >= _MIN_ROOM:
            break
    assert best is not None
    cells.remove(best.place)
    return best


def _position(
    rng: np.random.Generator, sides: tuple[int, int], cell: tuple[int, int], radius: float
) -> tuple[float, float]:
    """A jittered centre in a cell of a 3x3 grid over the central square, with the whole object inside that square.

    Evaluation crops the central square; what lies outside could not be found there.
    """
    short = min(sides)
    centre = []
    for side, column in zip(sides, cell, strict=True):
        start = (side - short) / 2
        ideal = start + short * ((column + 0.5) / 3 + float(rng.uniform(-0.04, 0.04)))
        centre.append(min(max(ideal, start + radius + 1), start + short - radius - 1))
    return centre[0], centre[1]
