"""The captions of a sample: long global ones joined from sentences, and single sentences as local ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cosmos_fast.config import ViewsConfig


def draw_captions(sentences: Sequence[str], views: ViewsConfig, numbers: np.random.Generator) -> list[str]:
    """Captions in view order, globals first.

    A global caption joins n ~ U{1..max_sentences} sentences, sampled without replacement, with ". "; the local ones are
    one sentence each, sampled without replacement among themselves and independently of the globals. Where the record
    has fewer sentences than asked for, the whole list is repeated first and only the rest is sampled.
    """
    captions = []
    for _ in range(views.global_captions):
        count = int(numbers.integers(1, views.max_sentences + 1))
        captions.append(". ".join(_sample(sentences, count, numbers)))
    return captions + _sample(sentences, views.local_captions, numbers)


def _sample(sentences: Sequence[str], count: int, numbers: np.random.Generator) -> list[str]:
    # As many as there are is not too few: they too come in a drawn order, or each would keep to one view.
    repeats, rest = divmod(count, len(sentences)) if count > len(sentences) else (0, count)
    picked = numbers.permutation(len(sentences))[:rest]
    return list(sentences) * repeats + [sentences[i] for i in picked]
