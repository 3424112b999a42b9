"""Captions of a scene in the seven lists of a DreamLIP record.

Three voices stand in for DreamLIP's three captioners, so that the lists differ in focus, wording and order:
IB names attributes, in reading order; SV says where things are, largest first; LLA chats, with synonyms, in any order.
Sentences carry no final period: training joins them by ". ".
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from cosmos_fast.data.synthetic.scene import CAPTIONS, Scene, SceneObject, SceneSettings, stream
from cosmos_fast.data.synthetic.vocabulary import (
    BACKGROUND_PHRASES,
    COLOUR_SYNONYMS,
    PLACE_PHRASES,
    PLACES,
    SHAPE_SYNONYMS,
    SIZE_SYNONYMS,
    SIZES,
    TEXTURE_SYNONYMS,
)

_DRAWS = 400  # choices a scene: 9 objects take about 150; drawn at once, which is faster
_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_VIEWS = ("picture", "image", "scene", "photo")
_MAX_INVENTORY = 6  # objects; more make a sentence of over 25 words
_WITH_TEXTURE = {
    "plain": ("with a plain surface", "in one solid color"),
    "striped": ("with stripes across it", "covered in stripes"),
    "dotted": ("with dots all over it", "covered in dots"),
    "checkered": ("with a checkerboard pattern", "covered in little checks"),
}


def write_captions(scene: Scene, settings: SceneSettings) -> dict[str, list[str]]:
    """The seven DreamLIP fields, each a list of sentences."""
    rng = stream(settings, scene.split, scene.index, CAPTIONS)
    speaker = _Speaker(scene, rng)
    fields = {
        "raw_caption": [speaker.raw()],
        "shortIB_captions": [speaker.short_ib()],
        "shortSV_captions": [speaker.short_sv()],
        "shortLLA_captions": [speaker.short_lla()],
        "longIB_captions": speaker.long_ib(),
        "longSV_captions": speaker.long_sv(),
        "longLLA_captions": speaker.long_lla(),
    }
    return {name: [s[0].upper() + s[1:] for s in sentences] for name, sentences in fields.items()}


def article(phrase: str) -> str:
    """The phrase with "a" or "an" in front."""
    return ("an " if phrase[0] in "aeio" else "a ") + phrase


def listing(items: Sequence[str]) -> str:
    """ "x", "x and y", "x, y and z"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


class _Speaker:
    """Says things about one scene, with one stream of random numbers."""

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self.scene = scene
        self.rng = rng
        self.objects = list(scene.objects)
        self.short_side = min(scene.width, scene.height)
        self.draws = iter(rng.random(_DRAWS).tolist())

    # -- words ---------------------------------------------------------------------------------------------------------
    def pick(self, options: Sequence[str]) -> str:
        return options[int(next(self.draws) * len(options))]

    def shuffled(self) -> list[SceneObject]:
        return [self.objects[i] for i in self.rng.permutation(len(self.objects))]

    def reading_order(self) -> list[SceneObject]:
        return sorted(self.objects, key=lambda o: (PLACES[o.place][1], PLACES[o.place][0]))

    def by_size(self) -> list[SceneObject]:
        return sorted(self.objects, key=lambda o: -o.radius)

    def backdrop(self) -> str:
        return self.pick(BACKGROUND_PHRASES[self.scene.background])

    def view(self) -> str:
        return self.pick(_VIEWS)

    def place(self, item: SceneObject) -> str:
        return self.pick(PLACE_PHRASES[item.place])

    def synonym(self, item: SceneObject) -> str:
        """Colour and shape, in other words."""
        return f"{self.pick(COLOUR_SYNONYMS[item.colour])} {self.pick(SHAPE_SYNONYMS[item.shape])}"

    # -- raw and short -------------------------------------------------------------------------------------------------
    def raw(self) -> str:
        """Alt text: every object by the plain names of colour and shape, sometimes more."""
        detail = int(self.rng.integers(4))
        items = []
        for item in self.shuffled():
            extra = {1: item.size, 2: item.texture}.get(detail, "")
            items.append(article(f"{extra} {name(item)}".strip()))
        tail = f" {self.pick(('on', 'against', 'over'))} {self.backdrop()}" if self.rng.random() < 0.6 else ""
        return listing(items) + tail

    def short_ib(self) -> str:
        """What is there."""
        return (
            listing([article(name(o)) for o in self.reading_order()])
            + f" in {self.pick(('one', 'the same'))} {self.view()}"
        )

    def short_sv(self) -> str:
        """How many, before what; the two largest."""
        first = listing([article(name(o)) for o in self.by_size()[:2]])
        among = "among them" if len(self.objects) > 2 else "namely"
        return f"{self.count()} in front of {self.backdrop()}, {among} {first}"

    def short_lla(self) -> str:
        """The two that stand out, and where."""
        first = self.by_size()[0]
        opening = self.pick(("a picture of", "an image showing", "a simple scene with"))
        sentence = f"{opening} {article(self.synonym(first))} {self.place(first)}"
        others = [o for o in self.shuffled() if o is not first]
        if not others:
            return sentence
        return f"{sentence}, {self.pick(('together with', 'along with', 'next to'))} {article(self.synonym(others[0]))}"

    def count(self) -> str:
        noun = self.pick(("object", "shape", "figure"))
        return f"{_COUNTS[len(self.objects)]} {noun}{'s' if len(self.objects) > 1 else ''}"

    # -- long ----------------------------------------------------------------------------------------------------------
    def long_ib(self) -> list[str]:
        """Attributes, in reading order; who is left of whom; the colours; the background."""
        sentences = [self._attributes(o) for o in self.reading_order()]
        sentences += self._relations(self._beside, 2)
        colours = list(dict.fromkeys(o.colour for o in self.reading_order()))
        if len(colours) > 1:
            sentences.append(f"the colors of the objects in the {self.view()} are {listing(colours)}")
        them = "them" if len(self.objects) > 1 else "it"
        sentences.append(f"the background behind {them} is {self.backdrop()}, seen in the whole {self.view()}")
        return sentences

    def long_sv(self) -> list[str]:
        """Places, largest first; who is above whom; the background first."""
        sentences = [f"the {self.view()} shows {self.count()} set against {self.backdrop()}"]
        sentences += [self._placed(o) for o in self.by_size()]
        return sentences + self._relations(self._stacked, 2)

    def long_lla(self) -> list[str]:
        """Small talk with synonyms, in any order; which is bigger; how many of what; the background."""
        sentences = [self._chat(o) for o in self.shuffled()]
        sentences += self._relations(self._compared, 1)
        if 1 < len(self.objects) <= _MAX_INVENTORY:
            sentences.append(
                f"{self.pick(('all in all', 'in total', 'altogether'))} there are {self._inventory()} here"
            )
        sentences.append(f"everything else that you see in the {self.view()} is {self.backdrop()}")
        return sentences

    def _inventory(self) -> str:
        """How many of each shape, colours aside: the one place where shapes are named alone."""
        shapes = Counter(o.shape for o in self.shuffled())
        items = [f"{_COUNTS[n]} {shape if n == 1 else _plural(shape)}" for shape, n in shapes.items()]
        return f"{self.count()}, namely {listing(items)}"

    def _attributes(self, item: SceneObject) -> str:
        opening = self.pick(("there is", "one can see", "we see", "here is"))
        what = article(f"{item.size} {item.texture} {name(item)}")
        return f"{opening} {what} {self.place(item)} of the {self.view()}"

    def _placed(self, item: SceneObject) -> str:
        what = article(f"{self.pick(SIZE_SYNONYMS[item.size])} {name(item)}")
        verb = self.pick(("lies", "sits", "rests", "is placed"))
        return f"{self.place(item)} of the {self.view()} {verb} {what} {self.pick(_WITH_TEXTURE[item.texture])}"

    def _chat(self, item: SceneObject) -> str:
        size, texture = self.pick(SIZE_SYNONYMS[item.size]), self.pick(TEXTURE_SYNONYMS[item.texture])
        opening = self.pick(("you can see", "we can make out", "you will find", "notice"))
        ending = self.pick((f"a {size} one with a {texture} look", f"it is {size} and looks {texture}"))
        return f"{opening} {article(self.synonym(item))} {self.place(item)}, {ending}"

    # -- relations -----------------------------------------------------------------------------------------------------
    def _relations(self, say: Callable[[SceneObject, SceneObject], str | None], limit: int) -> list[str]:
        """Up to `limit` sentences about pairs, as far as `say` has something to say about them."""
        order = self.shuffled()
        found = (say(a, b) for i, a in enumerate(order) for b in order[i + 1 :])
        return list(itertools.islice((sentence for sentence in found if sentence is not None), limit))

    def _beside(self, a: SceneObject, b: SceneObject) -> str | None:
        if abs(a.x - b.x) < 0.2 * self.short_side:
            return None
        side = "left" if a.x < b.x else "right"
        how = self.pick(("is to the {s} of", "is {s} of", "stands to the {s} of")).format(s=side)
        return f"the {name(a)} {how} the {name(b)}"

    def _stacked(self, a: SceneObject, b: SceneObject) -> str | None:
        if abs(a.y - b.y) < 0.2 * self.short_side:
            return None
        how = self.pick(("is above", "is higher up than") if a.y < b.y else ("is below", "is lower down than"))
        return f"in this {self.view()} the {name(a)} {how} the {name(b)}"

    def _compared(self, a: SceneObject, b: SceneObject) -> str | None:
        sizes = list(SIZES)
        difference = sizes.index(a.size) - sizes.index(b.size)
        if difference == 0:
            return None
        how = self.pick(("bigger", "larger") if difference > 0 else ("smaller", "less big"))
        return f"the {self.synonym(a)} looks {how} than the {self.synonym(b)}"


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("ss") else "s")


def name(item: SceneObject) -> str:
    """Colour and shape by their plain names, such as "red circle"."""
    return f"{item.colour} {item.shape}"
