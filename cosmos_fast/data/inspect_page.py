"""What `data inspect` found, as one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cosmos_fast.config import TrainConfig
from cosmos_fast.data.contact_sheet import Card, printable, strip
from cosmos_fast.data.inspect import Survey, headline, named, percent


def render(surveys: Sequence[Survey], cards: Sequence[Card], config: TrainConfig) -> str:
    """The page: statistics of each source, then the samples. Texts from shards are escaped."""
    jinja = Environment(
        loader=PackageLoader("cosmos_fast.data", "assets"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return jinja.get_template("inspect.html.j2").render(
        title="Data: " + ", ".join(printable(found.name) for found in surveys),
        sources=[_source(found) for found in surveys],
        cards=[_card(card) for card in cards],
        context_length=config.model.text.context_length,
        seed=config.seed,
    )


def _source(found: Survey) -> dict[str, Any]:
    counts = (("members", found.kinds), ("schema", found.schemas), ("images", found.formats))
    return {
        "headline": headline(found),
        "counts": [(name, [(value, f"{n:,}") for value, n in part.most_common(8)]) for name, part in counts if part],
        "cut": [
            f"{name} longer than {found.context_length} tokens, cut: {percent(cut, count)}"
            for name, cut, count in found.cut()
        ],
        "histograms": found.histograms(),
        "bad": len(found.faults),
        "causes": [(cause, count, named(found, cause)) for cause, count in found.causes.most_common()],
    }


def _card(card: Card) -> dict[str, Any]:
    data = io.BytesIO()
    strip(card).save(data, "JPEG", quality=88)
    uri = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
    return {
        "about": card.about,
        "picture": Markup(uri),  # letters, digits, + / = only
        "captions": card.captions,
        "global_captions": card.global_captions,
    }
